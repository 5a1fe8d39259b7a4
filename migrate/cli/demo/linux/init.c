/* The first and only program of a Linux guest that checks itself. Freestanding: system calls, and no library.
 *
 * Words after `--` of the kernel's command line (defaults in brackets):
 *   tick=MS [20]        a line `tick N T` that often; T is CLOCK_MONOTONIC in ms
 *   dirty=MIB [16]      an arena of that size, whose pages are verified and rewritten, `rate` of them a tick [256]
 *   disk=N [0]          /dev/vda and, with 2, /dev/vdb: blocks of 64 KiB are written, `fsync` after every eighth, and read back at
 *                       random; of the second only what is corrupt is told
 *   diskmb=MIB [16]     how much of it
 *   pause=MS [5]        between two requests
 *
 * Lines on the serial port: `ready`, `tick N T`, `synced G` (all writes up to generation G last; never said again once a write or
 * an fsync has failed), `CORRUPT …`, `corrupt K` (so many so far), and in answer to the line `check`: `checked pages=P blocks=B
 * corrupt=K synced=G`. The line `quit` powers off, once no request is out: newer kernels break their virtio devices at a
 * shutdown (seen of Debian's 6.1.192), and what a process writes after that fails.
 *
 * A block on the disk: 128 sectors, each with magic, block, generation, sector (64 bits each, little-endian), then 60 words
 * mix(block, generation, sector * 64 + position).
 */

typedef unsigned long u64;
typedef unsigned char u8;

enum {
	SYS_read = 0, SYS_write = 1, SYS_open = 2, SYS_close = 3, SYS_poll = 7, SYS_mmap = 9, SYS_ioctl = 16,
	SYS_pread = 17, SYS_pwrite = 18, SYS_nanosleep = 35, SYS_fork = 57, SYS_exit = 60, SYS_fsync = 74,
	SYS_mkdir = 83, SYS_mount = 165, SYS_reboot = 169, SYS_clock_gettime = 228, SYS_finit_module = 313,
};
enum { PAGE = 4096, WORDS = PAGE / 8, BLOCK = 65536, SECTOR = 512, SECTORS = BLOCK / SECTOR, SECTOR_WORDS = SECTOR / 8 };
enum { ARENA = 32 << 20, MAX_BLOCKS = 4096 };
static const u64 MAGIC = 0x4b53494459525246; /* "FRRYDISK" */

static long call(long n, long a, long b, long c, long d, long e, long f)
{
	long result;
	register long r10 asm("r10") = d;
	register long r8 asm("r8") = e;
	register long r9 asm("r9") = f;
	asm volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
		     : "rcx", "r11", "memory");
	return result;
}
#define CALL(n, a, b, c) call(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)

void *memset(void *to, int value, u64 size)
{
	u8 *at = to;
	while (size--)
		*at++ = (u8)value;
	return to;
}

/* -- words ------------------------------------------------------------------------------------------------------------------ */

static int serial;

struct line { char text[200]; u64 size; };

static void put(struct line *line, const char *text)
{
	while (*text && line->size < sizeof line->text - 2)
		line->text[line->size++] = *text++;
}

static void number(struct line *line, u64 value)
{
	char digits[24];
	int at = 23;
	digits[at] = 0;
	do
		digits[--at] = (char)('0' + value % 10);
	while (value /= 10);
	put(line, digits + at);
}

/* A whole line by one write. The port is slower than we are: what it did not take is written again. */
static void say(struct line *line)
{
	u64 done = 0;
	line->text[line->size++] = '\n';
	while (done < line->size) {
		long sent = CALL(SYS_write, serial, line->text + done, line->size - done);
		if (sent > 0)
			done += (u64)sent;
	}
	line->size = 0;
}

static u64 option(char **argv, const char *name, u64 otherwise)
{
	for (; *argv; argv++) {
		const char *a = *argv, *b = name;
		while (*b && *a == *b)
			a++, b++;
		if (*b || *a++ != '=')
			continue;
		u64 value = 0;
		while (*a >= '0' && *a <= '9')
			value = value * 10 + (u64)(*a++ - '0');
		return value;
	}
	return otherwise;
}

static u64 now_ms(void)
{
	u64 spec[2];
	CALL(SYS_clock_gettime, 1, spec, 0);
	return spec[0] * 1000 + spec[1] / 1000000;
}

static void sleep_ms(u64 ms)
{
	u64 spec[2] = { ms / 1000, ms % 1000 * 1000000 };
	CALL(SYS_nanosleep, spec, 0, 0);
}

static void *memory(u64 size, int shared)
{
	return (void *)call(SYS_mmap, 0, (long)size, 3, 0x20 | (shared ? 1 : 2), -1, 0);
}

static u64 mix(u64 a, u64 b, u64 c)
{
	u64 x = a * 0x9e3779b97f4a7c15 ^ b * 0xc2b2ae3d27d4eb4f ^ (c + 1) * 0x165667b19e3779f9;
	return x ^ x >> 29;
}

/* What the two processes share. */
struct shared { volatile u64 corrupt, synced, asked, answered, blocks, on_disk, ending, at_work; };
static struct shared *shared;

static void corrupt(const char *what, const char *where, u64 at, u64 expected, u64 got)
{
	struct line line = { .size = 0 };
	put(&line, "CORRUPT ");
	put(&line, what);
	put(&line, where);
	number(&line, at);
	put(&line, " expected=");
	number(&line, expected);
	put(&line, " got=");
	number(&line, got);
	say(&line);
	put(&line, "corrupt ");
	number(&line, __atomic_add_fetch(&shared->corrupt, 1, __ATOMIC_SEQ_CST));
	say(&line);
}

/* -- memory ----------------------------------------------------------------------------------------------------------------- */

static u64 *arena, *generation, pages;

static void fill(u64 page)
{
	u64 *word = arena + page * WORDS, again = generation[page];
	word[0] = page;
	word[1] = again;
	for (u64 i = 2; i < WORDS; i++)
		word[i] = mix(page, again, i);
}

static void verify(u64 page)
{
	u64 *word = arena + page * WORDS, again = generation[page];
	if (word[0] != page || word[1] != again) {
		corrupt("memory", " page=", page, again, word[1]);
		return;
	}
	for (u64 i = 2; i < WORDS; i++)
		if (word[i] != mix(page, again, i)) {
			corrupt("memory", " page=", page, i, word[i]);
			return;
		}
}

/* -- the disk --------------------------------------------------------------------------------------------------------------- */

static int disk;
static int failed; /* a write or an fsync: what lasts is not known any more */
static u64 written[MAX_BLOCKS]; /* generation of each block, 0: never written */

static void errno_of(long result)
{
	corrupt("disk", " errno=", (u64)-result, 0, 0);
}

static void write_block(u8 *buffer, u64 block, u64 again)
{
	u64 *word = (u64 *)buffer;
	for (u64 sector = 0; sector < SECTORS; sector++, word += SECTOR_WORDS) {
		word[0] = MAGIC;
		word[1] = block;
		word[2] = again;
		word[3] = sector;
		for (u64 i = 4; i < SECTOR_WORDS; i++)
			word[i] = mix(block, again, sector * SECTOR_WORDS + i);
	}
	long result = call(SYS_pwrite, disk, (long)buffer, BLOCK, (long)(block * BLOCK), 0, 0);
	if (result != BLOCK) {
		errno_of(result);
		failed = 1;
	}
	written[block] = again;
}

/* Whether all writes so far last. */
static int sync_disk(void)
{
	long result = CALL(SYS_fsync, disk, 0, 0);
	if (result) {
		errno_of(result);
		failed = 1;
	}
	return !failed;
}

static void read_block(u8 *buffer, u64 block)
{
	memset(buffer, 0x5a, SECTOR); /* a read that stores nothing is seen */
	long result = call(SYS_pread, disk, (long)buffer, BLOCK, (long)(block * BLOCK), 0, 0);
	if (result != BLOCK) {
		errno_of(result);
		return;
	}
	u64 *word = (u64 *)buffer, again = written[block];
	for (u64 sector = 0; sector < SECTORS; sector++, word += SECTOR_WORDS) {
		if (word[0] != MAGIC || word[1] != block || word[2] != again || word[3] != sector) {
			corrupt("disk", " block=", block, again, word[2]);
			return;
		}
		for (u64 i = 4; i < SECTOR_WORDS; i++)
			if (word[i] != mix(block, again, sector * SECTOR_WORDS + i)) {
				corrupt("disk", " block=", block, again, i);
				return;
			}
	}
}

static void disk_process(u64 blocks, u64 pause, int tells)
{
	u8 *buffer = memory(BLOCK, 0), *into = memory(ARENA, 0);
	u64 again = 0, seed = 1, slot = 0;
	while (!shared->ending) {
		if (tells && shared->asked != shared->answered) {
			u64 seen = 0;
			if (sync_disk())
				shared->synced = again;
			for (u64 block = 0; block < blocks; block++)
				if (written[block]) {
					read_block(into + slot++ % (ARENA / BLOCK) * BLOCK, block);
					seen++;
				}
			shared->blocks = seen;
			shared->answered = shared->asked;
		}
		again++;
		write_block(buffer, again % blocks, again);
		if (again % 8 == 0) {
			struct line line = { .size = 0 };
			int lasts = sync_disk();
			if (!tells)
				continue;
			if (lasts) {
				shared->synced = again;
				put(&line, "synced ");
				number(&line, again);
				say(&line);
			}
		}
		seed = mix(seed, again, 7);
		u64 block = seed % blocks;
		if (written[block])
			read_block(into + slot++ % (ARENA / BLOCK) * BLOCK, block);
		sleep_ms(pause);
	}
	__atomic_sub_fetch(&shared->at_work, 1, __ATOMIC_SEQ_CST);
	CALL(SYS_exit, 0, 0, 0);
}

/* -- the beginning and the end ------------------------------------------------------------------------------------------------ */

static void end(void)
{
	shared->ending = 1;
	for (u64 tries = 0; shared->at_work && tries < 500; tries++) /* a disk that hangs does not keep us */
		sleep_ms(10);
	CALL(SYS_reboot, 0xfee1dead, 672274793, 0x4321fedc);
	for (;;)
		sleep_ms(1000);
}

static void load_modules(void)
{
	char path[] = "/modules/0";
	for (; path[9] <= '9'; path[9]++) {
		long fd = CALL(SYS_open, path, 0, 0);
		if (fd < 0)
			return;
		CALL(SYS_finit_module, fd, "", 0);
		CALL(SYS_close, fd, 0, 0);
	}
}

/* Raw: every byte as it is, nothing echoed. */
static void open_serial(void)
{
	struct { unsigned input, output, control, local; u8 line, characters[19]; } mode;
	serial = (int)CALL(SYS_open, "/dev/ttyS0", 02 | 0400, 0); /* O_RDWR, O_NOCTTY */
	memset(&mode, 0, sizeof mode);
	CALL(SYS_ioctl, serial, 0x5401, &mode); /* TCGETS */
	mode.input = mode.output = mode.local = 0;
	CALL(SYS_ioctl, serial, 0x5402, &mode); /* TCSETS */
}

static void check(void)
{
	struct line line = { .size = 0 };
	for (u64 page = 0; page < pages; page++)
		verify(page);
	if (shared->on_disk) {
		shared->asked++;
		while (shared->answered != shared->asked)
			sleep_ms(1);
	}
	put(&line, "checked pages=");
	number(&line, pages);
	put(&line, " blocks=");
	number(&line, shared->blocks);
	put(&line, " corrupt=");
	number(&line, shared->corrupt);
	put(&line, " synced=");
	number(&line, shared->synced);
	say(&line);
}

static void hear(void)
{
	static char word[16];
	static u64 size;
	struct { int fd; short events, happened; } poll = { serial, 1, 0 };
	while (CALL(SYS_poll, &poll, 1, 0) == 1 && poll.happened & 1) {
		char byte;
		if (CALL(SYS_read, serial, &byte, 1) != 1)
			return;
		if (byte != '\n' && size < sizeof word - 1) {
			word[size++] = byte;
			continue;
		}
		if (word[0] == 'c')
			check();
		if (word[0] == 'q')
			end();
		size = 0;
	}
}

void main(char **argv)
{
	CALL(SYS_mkdir, "/dev", 0755, 0);
	call(SYS_mount, (long)"dev", (long)"/dev", (long)"devtmpfs", 0, 0, 0);
	load_modules();
	open_serial();
	u64 tick = option(argv, "tick", 20), rate = option(argv, "rate", 256), on = option(argv, "disk", 0);
	u64 blocks = option(argv, "diskmb", 16) * 16, pause = option(argv, "pause", 5);
	pages = option(argv, "dirty", 16) * 256;
	shared = memory(PAGE, 1);
	arena = memory(pages * PAGE + PAGE, 0);
	generation = memory(pages * 8 + PAGE, 0);
	for (u64 page = 0; page < pages; page++)
		fill(page);
	for (u64 which = 0; which < on && which < 2; which++) {
		for (u64 tries = 0; tries < 200; tries++) {
			disk = (int)CALL(SYS_open, which ? "/dev/vdb" : "/dev/vda", 02 | 040000, 0); /* O_RDWR, O_DIRECT */
			if (disk >= 0)
				break;
			sleep_ms(10);
		}
		if (disk < 0)
			errno_of(disk);
		else {
			shared->on_disk |= !which;
			__atomic_add_fetch(&shared->at_work, 1, __ATOMIC_SEQ_CST);
			if (!CALL(SYS_fork, 0, 0, 0))
				disk_process(blocks > MAX_BLOCKS ? MAX_BLOCKS : blocks, pause, !which);
		}
	}
	struct line line = { .size = 0 };
	put(&line, "ready");
	say(&line);
	u64 next = now_ms(), at = 0;
	for (u64 n = 1;; n++) {
		u64 now = now_ms();
		put(&line, "tick ");
		number(&line, n);
		put(&line, " ");
		number(&line, now);
		say(&line);
		for (u64 i = 0; pages && i < rate; i++, at = (at + 1) % pages) {
			verify(at);
			generation[at]++;
			fill(at);
		}
		hear();
		next += tick;
		now = now_ms();
		if (next > now)
			sleep_ms(next - now);
		else
			next = now; /* the host was busy: no burst of ticks follows */
	}
}

asm(".globl _start\n_start:\n lea 8(%rsp), %rdi\n and $-16, %rsp\n call main\n");
