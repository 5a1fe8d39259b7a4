/* What the parts of the guest share. Devices' registers: docs/devices.md; the platform page: ../platform_page.py; the boot
   page: ../boot.py. */

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
_Static_assert(sizeof(u64) == 8, "x86-64 only");

#define PAGE 4096

/* Memory map. The program lies at 1 MiB, its stack ends at 2 MiB. */
#define BOOT_PAGE 0x1000
#define FENCE 0x200000      /* where the display stores its fence */
#define SCSI 0x240000       /* the SCSI controller's program, its data and the record of blocks, up to SCSI_END */
#define SCSI_END 0x300000
#define DISK 0x300000       /* rings, requests and the record of blocks, up to GENERATIONS */
#define GENERATIONS 0x400000 /* one u32 a page of the working set, up to WORKING_SET */
#define WORKING_SET 0x800000

static inline u8 read8(u64 address) { return *(volatile u8 *)address; }
static inline void write8(u64 address, u8 value) { *(volatile u8 *)address = value; }
static inline u16 read16(u64 address) { return *(volatile u16 *)address; }
static inline void write16(u64 address, u16 value) { *(volatile u16 *)address = value; }
static inline u32 read32(u64 address) { return *(volatile u32 *)address; }
static inline void write32(u64 address, u32 value) { *(volatile u32 *)address = value; }

/* boot.c: what machine this is. */
struct device {
	u64 registers; /* 0: there is none */
	u32 irq;
	u32 vectors; /* lines from irq on */
};
#define CONFIG_SPACE 0xf00000 /* of a PCI function, from its registers on */
extern u64 ram_size;
extern u32 device_count;
void boot_read(void);
struct device boot_device(const char *type);           /* the first of its type, or of a model of it */
u64 boot_option(const char *key, u64 otherwise); /* a number from the command line */

/* The platform page. */
u32 pending(void);
void pending_clear(u32 lines);
void mask_set(u32 lines);
u32 mask_get(void);
void idle(u64 microseconds);
_Noreturn void power_off(u32 value);

/* console.c: the UART, and what is said on it. */
void console_open(void);
void say(const char *text);
void say_number(u64 value); /* a space, then the number */
void say_end(void);
void corrupt(const char *what, u64 where, u64 want, u64 got);
void loopback_leave(u64 tick); /* put bytes into the receive FIFO … */
void loopback_check(void);     /* … and find them there, a tick later */

/* clock.c: the rtc, or without one a count of our own. */
void clock_open(void);
u64 clock_wall(void); /* ns since 1970, or without an rtc since boot */
u64 clock_now(void); /* ns since the machine's first start; notices how long it was not called */
extern u64 clock_gap;     /* the longest time between two calls, in ns, since it was last set to 0 */
extern u64 clock_max_gap; /* the same since boot */
void clock_slept(u64 microseconds); /* for the clock of our own */
void alarm_set(u64 tick);
void alarm_look(void); /* as often as there is time */
void scratch_check(u64 tick);
void scratch_set(u64 tick);

/* pages.c: the working set. */
u64 mix(u64 x); /* looks like a random number and follows from x */
extern u64 page_count;
extern u64 rewritten;
extern u64 pages_batch; /* what to rewrite between two looks at the clock: some milliseconds */
void pages_open(void);
void pages_rewrite(u64 count);
void pages_sweep(u64 count);

/* screen.c: the display. */
void screen_open(void);
void screen_step(u64 tick);

/* virtio.c: a virtio-pci function and its virtqueues. */
struct descriptor {
	u64 address;
	u32 length;
	u16 flags, next;
};
enum { DESCRIPTOR_NEXT = 1, DESCRIPTOR_WRITE = 2, DESCRIPTOR_INDIRECT = 4 };
#define VIRTIO_INDIRECT (1UL << 28)
#define VIRTIO_EVENT_IDX (1UL << 29)
#define VIRTIO_VERSION_1 (1UL << 32)
struct queue {
	struct descriptor *descriptors;
	volatile u16 *available;
	u64 used, notify;
	u32 size, line; /* entries; the bit of its interrupt */
	u16 number, offered, seen, unsaid;
	int event_idx;
};
extern u64 virtio_config; /* where the device's configuration is */
u64 virtio_open(struct device device, u64 wanted); /* the features agreed; 0: it cannot be used */
u32 virtio_queues(void);
void queue_open(struct queue *queue, u32 number, u64 rings, u32 size, u64 features, struct device device);
void virtio_go(void);
void queue_offer(struct queue *queue, u32 head);
void queue_notify(struct queue *queue); /* if the device wants to be told of what was offered */
int queue_ready(struct queue *queue);
int queue_next(struct queue *queue, u32 *written);

/* blocks.c: what blocks of 4 KiB hold after an operation. */
#define BLOCK 4096
struct block_words {
	const char *sector, *data; /* what is said of one that is another's, or damaged */
};
void block_fill(u64 *word, u32 block, u32 number, u32 seed);
void block_verify(const struct block_words *words, const u64 *word, u32 block, u32 number, u32 seed, int zero);

/* scsi.c: the disk behind a SCSI controller. */
extern u32 scsi_line; /* its interrupt */
void scsi_open(void);
void scsi_step(void);
void scsi_look(void); /* as often as there is time */

/* disk.c: the disk. */
extern u32 disk_lines; /* its interrupts */
void disk_open(void);
void disk_step(void);
void disk_look(void); /* as often as there is time */

/* start.S */
int registers_check(u64 *want, u64 *got);
