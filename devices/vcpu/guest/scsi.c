/* A SCSI disk behind an LSI 53C895A: blocks that are written, read back and verified, and flushed now and then, one command at a time.

   The controller does a command by itself, by a program in its own language: it selects the target and follows the phases of the
   bus until the target is done, reselection and all, then interrupts. So a command is on its way while the guest does other
   things. LSI53C895A manual, chapters 4 (registers) and 5 (instructions).

   Operation n (from 1) writes block mix(n ^ SALT) % blocks; blocks.c has what it puts there. After `F n` on the UART all
   operations up to n last. */

#include "guest.h"

enum { PROGRAM = SCSI, COMMAND = SCSI + 0x800, WHO = SCSI + 0x810, MESSAGE = SCSI + 0x818, STATUS = SCSI + 0x820 };
enum { DATA = SCSI + 0x1000, RECORD = SCSI + 0x10000, MOST_BLOCKS = (SCSI_END - RECORD) / 4 };
enum { SECTORS = BLOCK / 512, IDENTIFY = 0x80, NO_ANSWER = 0xff };

enum { DSTAT = 0x0c, ISTAT = 0x14, DSP = 0x2c, DSPS = 0x30, DIEN = 0x39, SIEN0 = 0x40, SIEN1 = 0x41, SIST0 = 0x42, SIST1 = 0x43 };
enum { DMA_RAISED = 1, SCSI_RAISED = 2 };
enum { DONE = 1, NO_PHASE = 2, NOBODY = 3 };
enum { TEST_UNIT_READY = 0x00, READ_CAPACITY = 0x25, READ = 0x28, WRITE = 0x2a, SYNCHRONIZE = 0x35, NOTHING = 0x100 };
enum { PCI_COMMAND = 0x04, EVERYTHING = 0x07 };

#define GRACE 1000000000UL  /* ns that an interrupt may be late, and … */
#define PATIENCE 500        /* … looks */
#define STUCK 30000000000UL /* ns without the answer */
#define SALT 0x5c510000u
#define TRIES 20000

u32 scsi_line;
static u64 registers, durable_sectors, overdue, asked_at;
static u32 every, per_flush, blocks, boot_seed, operation, flushed, reads, turn, looks, left;
static u32 kind = NOTHING, block, number; /* what is under way */
static u32 *const last = (u32 *)RECORD;   /* of each block the number of its last operation; 0: unknown */
static const struct block_words words = { "scsi_sector", "scsi_data" };

/* -- the controller's program -------------------------------------------------------------------------------------------------- */

enum { DATA_OUT = 0, DATA_IN = 1, COMMAND_OUT = 2, STATUS_IN = 3, MESSAGE_OUT = 6, MESSAGE_IN = 7, DISCONNECT = 4 };
enum {
	SELECT = 0x41000000, JUMP = 0x80080000, IF_BYTE = 1 << 18, IF_PHASE = 1 << 17, ONCE_KNOWN = 1 << 16,
	CLEAR_ACK = 0x60000040, WAIT_DISCONNECT = 0x48000000, WAIT_RESELECT = 0x50000000
};
#define INTERRUPT 0x98080000u
#define MOVE(phase, count) ((phase) << 24 | (count))

enum { /* its instructions, in order */
	BEGIN, SAY_WHO, SAY_WHAT,
	NEXT, IF_IN, IF_OUT, IF_STATUS, ELSE,
	HEAR, IF_BYE, HEARD, GO_ON,
	BYE, AWAY, BACK, GO_ON_THEN,
	TAKE, TAKEN, GIVE, GIVEN,
	END, LAST_MESSAGE, LAST_HEARD, GONE, TELL,
	ABSENT, LENGTH
};
#define AT(instruction) (PROGRAM + 8 * (instruction))

static const u32 program[LENGTH][2] = {
	[BEGIN] = { SELECT, AT(ABSENT) },
	[SAY_WHO] = { MOVE(MESSAGE_OUT, 1), WHO },
	[SAY_WHAT] = { MOVE(COMMAND_OUT, 10), COMMAND },
	[NEXT] = { JUMP | IF_PHASE | ONCE_KNOWN | MESSAGE_IN << 24, AT(HEAR) },
	[IF_IN] = { JUMP | IF_PHASE | DATA_IN << 24, AT(TAKE) },
	[IF_OUT] = { JUMP | IF_PHASE | DATA_OUT << 24, AT(GIVE) },
	[IF_STATUS] = { JUMP | IF_PHASE | STATUS_IN << 24, AT(END) },
	[ELSE] = { INTERRUPT, NO_PHASE },
	[HEAR] = { MOVE(MESSAGE_IN, 1), MESSAGE },
	[IF_BYE] = { JUMP | IF_BYTE | DISCONNECT, AT(BYE) },
	[HEARD] = { CLEAR_ACK, 0 },
	[GO_ON] = { JUMP, AT(NEXT) },
	[BYE] = { CLEAR_ACK, 0 },
	[AWAY] = { WAIT_DISCONNECT, 0 },
	[BACK] = { WAIT_RESELECT, AT(ABSENT) },
	[GO_ON_THEN] = { JUMP, AT(NEXT) },
	[TAKE] = { MOVE(DATA_IN, BLOCK), DATA },
	[TAKEN] = { JUMP, AT(NEXT) },
	[GIVE] = { MOVE(DATA_OUT, BLOCK), DATA },
	[GIVEN] = { JUMP, AT(NEXT) },
	[END] = { MOVE(STATUS_IN, 1), STATUS },
	[LAST_MESSAGE] = { MOVE(MESSAGE_IN, 1), MESSAGE },
	[LAST_HEARD] = { CLEAR_ACK, 0 },
	[GONE] = { WAIT_DISCONNECT, 0 },
	[TELL] = { INTERRUPT, DONE },
	[ABSENT] = { INTERRUPT, NOBODY },
};

static void submit(u32 what, u32 sector, u32 sectors, u32 bytes)
{
	u8 *command = (u8 *)COMMAND;
	u32 (*code)[2] = (u32 (*)[2])PROGRAM;

	for (u32 i = 0; i < LENGTH; i++)
		for (u32 j = 0; j < 2; j++)
			code[i][j] = program[i][j];
	code[SAY_WHAT][0] = MOVE(COMMAND_OUT, what == TEST_UNIT_READY ? 6 : 10);
	code[TAKE][0] = MOVE(DATA_IN, bytes);
	code[GIVE][0] = MOVE(DATA_OUT, bytes);
	for (u32 i = 0; i < 16; i++)
		command[i] = 0;
	command[0] = (u8)what;
	for (u32 i = 0; i < 4; i++)
		command[2 + i] = (u8)(sector >> (24 - 8 * i));
	command[8] = (u8)sectors;
	write8(WHO, IDENTIFY);
	write8(STATUS, NO_ANSWER);
	kind = what;
	looks = 0;
	overdue = 0;
	asked_at = clock_now();
	pending_clear(scsi_line);
	write32(registers + DSP, AT(BEGIN));
}

/* Take back what the controller has raised; its level is down when this returns. 0: nothing was. Else what the program said. */
static u32 answer(void)
{
	u32 said = 0, status;

	pending_clear(scsi_line);
	while ((status = read8(registers + ISTAT)) & (DMA_RAISED | SCSI_RAISED)) {
		if (status & SCSI_RAISED) {
			u32 why = read8(registers + SIST0);

			corrupt("scsi_bus", kind, 0, why | (u32)read8(registers + SIST1) << 8);
		}
		if (status & DMA_RAISED) {
			said = read32(registers + DSPS);
			read8(registers + DSTAT);
		}
	}
	return said;
}

/* A command at the start, when there is nothing else to do. Its status; NO_ANSWER: none. */
static u32 ask(u32 what, u32 bytes)
{
	u32 said = 0;

	submit(what, 0, 0, bytes);
	for (u32 i = 0; i < TRIES && !said; i++)
		said = answer();
	kind = NOTHING;
	return said == DONE ? read8(STATUS) : NO_ANSWER;
}

void scsi_open(void)
{
	struct device device = boot_device("lsi53c895a");
	u32 status = NO_ANSWER;

	every = scsi_line = 0;
	kind = NOTHING;
	if (!device.registers || !boot_option("scsi", 2))
		return;
	registers = device.registers;
	scsi_line = 1u << device.irq;
	write16(registers + CONFIG_SPACE + PCI_COMMAND, EVERYTHING);
	write8(registers + DIEN, 0x7d);
	write8(registers + SIEN0, 0x8f);
	write8(registers + SIEN1, 0x04);
	for (u32 i = 0; i < 10 && status; i++) /* that it was reset is a status of its own */
		status = ask(TEST_UNIT_READY, 0);
	if (status || ask(READ_CAPACITY, 8)) {
		corrupt("scsi_open", 0, 0, status);
		scsi_line = 0;
		return;
	}

	u64 sectors = 1, wanted = boot_option("scsi_kb", 2048) * 1024 / BLOCK;

	for (u32 i = 0; i < 4; i++)
		sectors += (u64)read8(DATA + i) << (24 - 8 * i);
	if (wanted > MOST_BLOCKS)
		wanted = MOST_BLOCKS;
	blocks = (u32)(sectors / SECTORS < wanted ? sectors / SECTORS : wanted);
	every = blocks ? (u32)boot_option("scsi", 2) : 0;
	per_flush = (u32)boot_option("flush", 32);
	boot_seed = (u32)(clock_wall() / 1000000);
	operation = flushed = reads = turn = left = 0;
	durable_sectors = 0;
	for (u32 i = 0; i < blocks; i++)
		last[i] = 0;
	say("L");
	say_number(sectors);
	say_number(blocks);
	say_number(boot_seed);
	say_end();
}

/* -- what is asked for --------------------------------------------------------------------------------------------------------- */

static void next(void)
{
	if (!left || kind != NOTHING)
		return;
	left--;
	if (per_flush && operation - flushed >= per_flush) {
		submit(SYNCHRONIZE, 0, 0, 0);
	} else if (turn++ % 2) {
		block = reads++ % blocks;
		number = last[block];
		submit(READ, block * SECTORS, SECTORS, BLOCK);
	} else {
		number = ++operation;
		block = (u32)(mix(number ^ SALT) % blocks);
		block_fill((u64 *)DATA, block, number, boot_seed);
		submit(WRITE, block * SECTORS, SECTORS, BLOCK);
	}
}

static void answered(u32 said)
{
	u32 what = kind, status = read8(STATUS);

	kind = NOTHING;
	if (said != DONE || status) {
		corrupt("scsi_status", what, said, status);
		if (what == WRITE)
			last[block] = 0;
		return;
	}
	switch (what) {
	case READ:
		if (number)
			block_verify(&words, (u64 *)DATA, block, number, boot_seed, 0);
		break;
	case WRITE:
		last[block] = number;
		break;
	case SYNCHRONIZE:
		durable_sectors += (u64)(operation - flushed) * SECTORS;
		flushed = operation;
		say("F");
		say_number(flushed);
		say_number(durable_sectors);
		say_end();
		break;
	}
}

/* The answer is looked for when an interrupt came. One that does not come, though the answer is there, is lost. */
void scsi_look(void)
{
	u32 said;

	if (kind == NOTHING)
		return;
	if (!(pending() & scsi_line)) {
		if (++looks < PATIENCE)
			return;
		looks = 0;

		u64 now = clock_now();

		if (read8(STATUS) == NO_ANSWER) {
			if (now - asked_at > STUCK) {
				corrupt("scsi_stuck", kind, 0, now - asked_at);
				asked_at = now;
			}
			return;
		}
		if (!overdue)
			overdue = now;
		if (now - overdue <= GRACE)
			return;
		corrupt("scsi_irq", 0, scsi_line, pending());
	}
	said = answer();
	if (said) {
		answered(said);
		next();
	}
}

void scsi_step(void)
{
	if (!every)
		return;
	left = every;
	next();
}
