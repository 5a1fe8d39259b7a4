/* The first process of a Linux guest: lists the PCI functions as lspci does (from sysfs), then drives two of them without
   interrupts: a serial port behind I/O ports, whose input it sends back, and a clock behind a memory BAR. */

#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DATA = 0, FCR = 2, LSR = 5, READY = 0x01, EMPTY = 0x20 };

static char text[4096];

static const char *attribute(const char *function, const char *name)
{
	char path[512];
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", function, name);
	int fd = open(path, O_RDONLY);
	long got = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[got > 0 ? got : 0] = 0;
	return text;
}

static unsigned long hex(const char *function, const char *name)
{
	unsigned long value = 0;
	sscanf(attribute(function, name), "%lx", &value);
	return value;
}

static void enable(const char *function)
{
	char path[512];
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/enable", function);
	int fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "1", 1) != 1)
		printf("enable failed %s\n", function);
	close(fd);
}

static void send(unsigned short port, const char *line)
{
	for (; *line; line++) {
		while (!(inb(port + LSR) & EMPTY))
			;
		outb(*line, port + DATA);
	}
}

static void serial(const char *function)
{
	unsigned long port = hex(function, "resource"), count = 0;
	char line[64];
	if (iopl(3))
		printf("iopl failed\n");
	printf("serial port %lx\n", port);
	outb(0x07, port + FCR);
	send(port, "the guest is here\n");
	while (count < sizeof line - 1) {
		while (!(inb(port + LSR) & READY))
			;
		line[count++] = inb(port + DATA);
		if (line[count - 1] == '\n')
			break;
	}
	line[count] = 0;
	send(port, "the guest heard: ");
	send(port, line);
}

static void clock_(const char *function)
{
	char path[512];
	enable(function);
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/resource0", function);
	int fd = open(path, O_RDWR);
	volatile uint32_t *registers = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (registers == MAP_FAILED) {
		printf("no clock\n");
		return;
	}
	registers[8] = 0x5EED;
	uint64_t time = registers[0];
	time |= (uint64_t)registers[1] << 32;
	printf("clock %llu scratch %x\n", (unsigned long long)time, registers[8]);
}

int main(void)
{
	mkdir("/sys", 0755);
	mount("none", "/sys", "sysfs", 0, 0);
	DIR *functions = opendir("/sys/bus/pci/devices");
	for (struct dirent *one; functions && (one = readdir(functions));) {
		const char *name = one->d_name;
		if (name[0] == '.')
			continue;
		unsigned long vendor = hex(name, "vendor"), device = hex(name, "device"), class = hex(name, "class");
		printf("function %s %04lx:%04lx class %06lx\n", name, vendor, device, class);
		if (vendor == 0x1b36 && device == 0x0002)
			serial(name);
		if (vendor == 0x1af4 && device == 0x10f0)
			clock_(name);
	}
	printf("done\n");
	fflush(stdout);
	sync();
	reboot(RB_POWER_OFF);
	return 0;
}
