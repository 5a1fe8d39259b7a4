/* The disk: blocks that are written, zeroed and discarded in an order that follows from a number, read back and verified all the
   time, and flushed now and then. Requests are on their way while the guest does other things, so a stop finds some there.

   Operation n (from 1) is on block mix(n) % blocks, and is a discard, a write of zeroes or a write by other bits of mix(n). What
   a block holds so follows from the number of its last operation. After `D n` on the UART all operations up to n last: whoever
   has the image can check that each block holds what its last operation up to n, or a later one, put there (blocks.c). */

#include "guest.h"

enum { IN = 0, OUT = 1, FLUSH = 4, DISCARD = 11, WRITE_ZEROES = 13, FREE = 99 };
enum { FEATURE_RO = 1 << 5, FEATURE_FLUSH = 1 << 9, FEATURE_MQ = 1 << 12, FEATURE_DISCARD = 1 << 13, FEATURE_ZEROES = 1 << 14 };
enum { SECTOR = 512, SECTORS = BLOCK / SECTOR };
enum { QUEUES = 2, SLOTS = 8, RING = 4 * SLOTS }; /* four descriptors a slot */
enum { RINGS = DISK, SLOT_AREA = DISK + 0x10000, BLOCKS_AREA = DISK + 0x40000, MOST_BLOCKS = (GENERATIONS - BLOCKS_AREA) / 4 };
enum { UNTOUCHED = 0xaa };

#define GRACE 1000000000UL  /* ns that an interrupt may be late, and … */
#define PATIENCE 500        /* … looks */
#define STUCK 30000000000UL /* ns without any answer */

struct range {
	u64 sector;
	u32 count, flags;
};

struct slot { /* two pages */
	struct {
		u32 kind, reserved;
		u64 sector;
		struct range range;
	} header;
	struct descriptor table[4];
	volatile u8 status;
	u32 kind, block, operation;
	u64 words[BLOCK / 8] __attribute__((aligned(PAGE)));
};
_Static_assert(sizeof(struct slot) == 2 * PAGE, "slots lie one after the other");

u32 disk_lines;
static struct queue queues[QUEUES];
static u32 queue_count, every, per_flush, blocks, boot_seed;
static u32 *const last = (u32 *)BLOCKS_AREA; /* of each block the number of its last operation; 0: unknown */
static u64 features, durable_sectors, sectors;
static u32 operation, flushed, reads, turn; /* numbers of the last operation, and of the last that lasts */
static u32 under_way, writes_under_way, looks;
static int flushing;
static u64 overdue, answered_at;
static const struct block_words words = { "disk_sector", "disk_data" };

static struct slot *slot_of(u32 queue, u32 number) { return (struct slot *)(u64)SLOT_AREA + queue * SLOTS + number; }

static u32 block_of(u32 number) { return (u32)(mix(number) % blocks); }

static u32 kind_of(u32 number)
{
	u32 chance = (u32)(mix(number) >> 48) % 16;

	if (chance == 0 && features & FEATURE_DISCARD)
		return DISCARD;
	return chance == 1 && features & FEATURE_ZEROES ? WRITE_ZEROES : OUT;
}

void disk_open(void)
{
	struct device device = boot_device("virtio-blk");

	every = disk_lines = under_way = 0;
	if (!device.registers || !device.vectors || !boot_option("disk", 4))
		return;
	features = virtio_open(device, VIRTIO_EVENT_IDX | VIRTIO_INDIRECT | FEATURE_RO | FEATURE_FLUSH | FEATURE_MQ
				       | FEATURE_DISCARD | FEATURE_ZEROES);
	if (!features) {
		corrupt("disk_open", 0, 1, 0);
		return;
	}
	queue_count = virtio_queues() < QUEUES ? virtio_queues() : QUEUES;
	for (u32 i = 0; i < queue_count; i++) {
		queue_open(&queues[i], i, RINGS + i * PAGE, RING, features, device);
		disk_lines |= queues[i].line;
		for (u32 j = 0; j < SLOTS; j++)
			slot_of(i, j)->kind = FREE;
	}
	virtio_go();
	sectors = read32(virtio_config) | (u64)read32(virtio_config + 4) << 32;
	per_flush = (u32)boot_option("flush", 32);

	u64 wanted = boot_option("disk_kb", 4096) * 1024 / BLOCK;

	if (wanted > MOST_BLOCKS)
		wanted = MOST_BLOCKS;
	blocks = (u32)(sectors / SECTORS < wanted ? sectors / SECTORS : wanted);
	every = blocks ? (u32)boot_option("disk", 4) : 0;
	boot_seed = (u32)(clock_wall() / 1000000);
	operation = flushed = reads = turn = writes_under_way = 0;
	durable_sectors = 0;
	flushing = 0;
	for (u32 i = 0; i < blocks; i++)
		last[i] = 0;
	answered_at = clock_now();
	say("V");
	say_number(sectors);
	say_number(queue_count);
	say_number(blocks);
	say_number(boot_seed);
	say_end();
}

/* -- requests ----------------------------------------------------------------------------------------------------------------- */

static struct slot *free_slot(u32 queue)
{
	for (u32 i = 0; i < SLOTS; i++)
		if (slot_of(queue, i)->kind == FREE)
			return slot_of(queue, i);
	return 0;
}

/* Two requests to one block have no order but that which we give them. */
static int in_use(u32 block)
{
	for (u32 q = 0; q < queue_count; q++)
		for (u32 i = 0; i < SLOTS; i++) {
			struct slot *slot = slot_of(q, i);

			if (slot->kind != FREE && slot->kind != FLUSH && slot->block == block)
				return 1;
		}
	return 0;
}

static void submit(u32 q, struct slot *slot, u32 kind, u32 block, u32 number)
{
	u32 at = (u32)(slot - slot_of(q, 0)), first = 4 * at, n = 0;
	int indirect = features & VIRTIO_INDIRECT && turn++ % 2;
	struct descriptor *chain = indirect ? slot->table : queues[q].descriptors + first;
	u16 base = (u16)(indirect ? 0 : first), data = kind == IN ? DESCRIPTOR_WRITE : 0;
	u64 cut = SECTOR * (1 + number % (SECTORS - 1));

	slot->kind = kind;
	slot->block = block;
	slot->operation = number;
	slot->status = UNTOUCHED;
	slot->header.kind = kind;
	slot->header.sector = kind == IN || kind == OUT ? (u64)block * SECTORS : 0;
	slot->header.range = (struct range){ (u64)block * SECTORS, SECTORS, kind == WRITE_ZEROES && number % 2 };
	chain[n++] = (struct descriptor){ (u64)&slot->header, 16, DESCRIPTOR_NEXT, (u16)(base + 1) };
	if (kind == IN || kind == OUT) {
		chain[n++] = (struct descriptor){ (u64)slot->words, (u32)cut, data | DESCRIPTOR_NEXT, (u16)(base + 2) };
		chain[n++] = (struct descriptor){ (u64)slot->words + cut, (u32)(BLOCK - cut), data | DESCRIPTOR_NEXT,
						  (u16)(base + 3) };
	} else if (kind != FLUSH) {
		chain[0].length += sizeof(struct range);
	}
	chain[n++] = (struct descriptor){ (u64)&slot->status, 1, DESCRIPTOR_WRITE, 0 };
	if (indirect)
		queues[q].descriptors[first] = (struct descriptor){ (u64)slot->table, n * 16, DESCRIPTOR_INDIRECT, 0 };
	under_way++;
	writes_under_way += kind != IN && kind != FLUSH;
	queue_offer(&queues[q], first);
}

static void lasts(void)
{
	durable_sectors += (u64)(operation - flushed) * SECTORS;
	flushed = operation;
	say("D");
	say_number(flushed);
	say_number(durable_sectors);
	say_end();
}

static void answered(u32 q, int head, u32 written)
{
	struct slot *slot = slot_of(q, (u32)head / 4);
	u32 kind = slot->kind;

	if (head < 0 || head >= RING || head % 4 || kind == FREE) {
		corrupt("disk_answer", q, (u64)head, kind);
		return;
	}
	slot->kind = FREE;
	under_way--;
	if (slot->status || written != (kind == IN ? BLOCK + 1 : 1))
		corrupt("disk_status", slot->block, slot->status, written);
	switch (kind) {
	case IN:
		if (slot->operation && !slot->status)
			block_verify(&words, slot->words, slot->block, slot->operation, boot_seed, kind_of(slot->operation) != OUT);
		break;
	case FLUSH:
		flushing = 0;
		if (!slot->status)
			lasts();
		break;
	default:
		writes_under_way--;
		last[slot->block] = slot->status ? 0 : slot->operation;
	}
}

static void take_answers(void)
{
	u32 written;
	int head;

	pending_clear(disk_lines);
	for (u32 q = 0; q < queue_count; q++)
		while ((head = queue_next(&queues[q], &written)) >= 0)
			answered(q, head, written);
	looks = 0;
	overdue = 0;
	answered_at = clock_now();
}

/* Answers are looked for when an interrupt came. One that does not come, though its answer is there, is lost. */
void disk_look(void)
{
	int ready = 0;

	if (!under_way)
		return;
	if (pending() & disk_lines) {
		take_answers();
		return;
	}
	if (++looks < PATIENCE)
		return;
	looks = 0;
	for (u32 q = 0; q < queue_count; q++)
		ready |= queue_ready(&queues[q]);

	u64 now = clock_now();

	if (!ready) {
		overdue = 0;
		if (now - answered_at > STUCK) {
			corrupt("disk_stuck", 0, 0, under_way);
			answered_at = now;
		}
	} else if (!overdue) {
		overdue = now;
	} else if (now - overdue > GRACE) {
		corrupt("disk_irq", 0, disk_lines, pending());
		take_answers();
	}
}

/* -- what is asked for --------------------------------------------------------------------------------------------------------- */

static int write_next(void)
{
	u32 number = operation + 1, block = block_of(number), q = number % queue_count;
	struct slot *slot = free_slot(q);

	if (!slot || in_use(block))
		return 0;
	operation = number;
	if (kind_of(number) == OUT)
		block_fill(slot->words, block, number, boot_seed);
	submit(q, slot, kind_of(number), block, number);
	return 1;
}

static void read_next(void)
{
	u32 block = reads % blocks, q = reads % queue_count;
	struct slot *slot = free_slot(q);

	reads++;
	if (slot && !in_use(block))
		submit(q, slot, IN, block, last[block]);
}

static void flush_next(void)
{
	u32 q = flushed / per_flush % queue_count;
	struct slot *slot = free_slot(q);

	if (!(features & FEATURE_FLUSH)) {
		lasts();
	} else if (slot) {
		flushing = 1;
		submit(q, slot, FLUSH, 0, 0);
	}
}

void disk_step(void)
{
	if (!every)
		return;
	for (u32 i = 0; i < every; i++) {
		int full = per_flush && operation - flushed >= per_flush;

		if (full && !writes_under_way && !flushing)
			flush_next();
		else if (!full && !(features & FEATURE_RO))
			write_next();
		read_next();
	}
	for (u32 q = 0; q < queue_count; q++)
		queue_notify(&queues[q]);
}
