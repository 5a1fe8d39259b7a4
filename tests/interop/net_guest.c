/* The first process of a Linux guest with a network function: sends numbered frames without end, several at a time, expects each
   back from whoever is at the other end, and says once a second or so how that goes:

     net sent=S echoed=E late=L bad=B strange=G

   bad: bytes that nobody sent. late: an echo of a frame that was given up. A line for each is on the serial port, besides. */

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { TYPE = 0x88b5, HEAD = 14, WINDOW = 16, LARGEST = 1514, PATIENCE_MS = 300 };

static uint8_t mac[6];
static uint64_t sent, echoed, late, bad, strange;
static struct { uint64_t number, since; } waiting[WINDOW];

static uint64_t now_ms(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000;
}

static void load_modules(void)
{
	char path[] = "/modules/0";
	for (; path[9] <= '9'; path[9]++) {
		int fd = open(path, O_RDONLY);
		if (fd < 0)
			return;
		if (syscall(SYS_finit_module, fd, "", 0))
			printf("%s: not loaded\n", path);
		close(fd);
	}
}

static int open_port(void)
{
	struct ifreq request = { 0 };
	struct sockaddr_ll here = { .sll_family = AF_PACKET, .sll_protocol = htons(TYPE) };
	int fd = socket(AF_PACKET, SOCK_RAW, htons(TYPE));
	strcpy(request.ifr_name, "eth0");
	for (int tries = 0; ioctl(fd, SIOCGIFHWADDR, &request) && tries < 500; tries++)
		usleep(10000);
	memcpy(mac, request.ifr_hwaddr.sa_data, 6);
	ioctl(fd, SIOCGIFFLAGS, &request);
	request.ifr_flags |= IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, &request))
		printf("eth0 does not come up\n");
	ioctl(fd, SIOCGIFINDEX, &request);
	here.sll_ifindex = request.ifr_ifindex;
	if (bind(fd, (struct sockaddr *)&here, sizeof here))
		printf("eth0 cannot be used\n");
	return fd;
}

/* All of a frame follows from its number, its addresses aside. */
static size_t body(uint8_t *frame, uint64_t number)
{
	size_t size = 60 + number * 37 % (LARGEST - 60 + 1);
	frame[12] = TYPE >> 8;
	frame[13] = TYPE & 0xff;
	memcpy(frame + HEAD, &number, 8);
	for (size_t at = HEAD + 8; at < size; at++)
		frame[at] = (uint8_t)(number * 31 + at * 7);
	return size;
}

static void heard(const uint8_t *frame, size_t size)
{
	uint8_t expected[LARGEST];
	uint64_t number;
	memcpy(&number, frame + HEAD, 8);
	if (size < HEAD + 8 || memcmp(frame, mac, 6)) {
		strange++;
		return;
	}
	if (number > sent || body(expected, number) != size || memcmp(frame + HEAD, expected + HEAD, size - HEAD)) {
		bad++;
		printf("bad frame of %zu bytes\n", size);
		return;
	}
	if (waiting[number % WINDOW].number == number) {
		waiting[number % WINDOW].number = 0;
		echoed++;
	} else {
		late++;
	}
}

int main(void)
{
	uint8_t frame[2048];
	mkdir("/dev", 0755);
	mount("dev", "/dev", "devtmpfs", 0, 0);
	load_modules();
	int fd = open_port();
	printf("ready\n");
	for (uint64_t told = now_ms();;) {
		uint64_t now = now_ms(), next = sent + 1;
		struct pollfd events = { fd, POLLIN, 0 };
		if (!waiting[next % WINDOW].number || now - waiting[next % WINDOW].since > PATIENCE_MS) {
			memset(frame, 0xff, 6);
			memcpy(frame + 6, mac, 6);
			size_t size = body(frame, next);
			if (send(fd, frame, size, MSG_DONTWAIT) == (ssize_t)size) {
				sent = next;
				waiting[next % WINDOW].number = next;
				waiting[next % WINDOW].since = now;
			}
		}
		if (poll(&events, 1, 2) == 1) {
			ssize_t size = recv(fd, frame, sizeof frame, MSG_DONTWAIT);
			if (size > 0)
				heard(frame, (size_t)size);
		}
		if (now - told >= 200) {
			told = now;
			printf("net sent=%llu echoed=%llu late=%llu bad=%llu strange=%llu\n", (unsigned long long)sent,
			       (unsigned long long)echoed, (unsigned long long)late, (unsigned long long)bad,
			       (unsigned long long)strange);
			fflush(stdout);
		}
	}
}
