/* The rtc: time that must not run back, an alarm whose interrupt must come, and a register that must keep its content. */

#include "guest.h"

enum { TIME = 0x00, MONO = 0x08, ALARM = 0x10, CONTROL = 0x18, STATUS = 0x1c, SCRATCH = 0x20 };
enum { ALARM_ON = 1, FIRED = 1 };

#define ALARM_AHEAD 3000000UL      /* ns */
#define ALARM_GRACE 1000000000UL   /* ns past the alarm, and … */
#define ALARM_PATIENCE 500         /* … looks at the interrupt, before it counts as lost */
#define ALARM_EVERY 16             /* ticks */

u64 clock_gap, clock_max_gap;
static u64 rtc;
static u32 line;
static u64 last;    /* what clock_now answered last */
static u64 counted; /* ns; the clock of our own */
static u64 alarm_at;
static u32 alarm_looks;

void clock_open(void)
{
	struct device device = boot_device("rtc");

	rtc = device.registers;
	line = rtc ? 1u << device.irq : 0;
	last = rtc ? 0 : counted;
	if (rtc) {
		write32(rtc + CONTROL, 0);
		write32(rtc + STATUS, FIRED);
		pending_clear(line);
		clock_now();
	}
	clock_gap = clock_max_gap = 0;
}

void clock_slept(u64 microseconds)
{
	if (!rtc)
		counted += microseconds * 1000;
}

static u64 read_pair(u32 offset)
{
	u64 low = read32(rtc + offset); /* this first: it fixes the other */

	return (u64)read32(rtc + offset + 4) << 32 | low;
}

u64 clock_wall(void) { return rtc ? read_pair(TIME) : counted; }

u64 clock_now(void)
{
	if (!rtc)
		return counted;

	u64 now = read_pair(MONO);

	if (now < last)
		corrupt("rtc_back", MONO, last, now);
	else {
		if (now - last > clock_gap)
			clock_gap = now - last;
		if (now - last > clock_max_gap)
			clock_max_gap = now - last;
	}
	last = now;
	return now;
}

void alarm_set(u64 tick)
{
	if (!rtc || alarm_at || tick % ALARM_EVERY)
		return;
	alarm_at = read_pair(TIME) + ALARM_AHEAD;
	alarm_looks = 0;
	write32(rtc + ALARM, (u32)alarm_at);
	write32(rtc + ALARM + 4, (u32)(alarm_at >> 32));
	write32(rtc + CONTROL, ALARM_ON);
}

void alarm_look(void)
{
	u32 raised = pending() & ~(disk_lines | scsi_line);

	if (raised & ~line) /* nobody waits for these: they would only keep us awake */
		pending_clear(raised & ~line);
	if (raised & line) {
		u64 time = read_pair(TIME);

		pending_clear(line);
		if (!alarm_at)
			return;
		if (time < alarm_at)
			corrupt("alarm_early", ALARM, alarm_at, time);
		if (!(read32(rtc + STATUS) & FIRED))
			corrupt("alarm_status", STATUS, FIRED, 0);
	} else if (!alarm_at || ++alarm_looks < ALARM_PATIENCE) {
		return;
	} else if (read_pair(TIME) > alarm_at + ALARM_GRACE) {
		corrupt("alarm_lost", ALARM, alarm_at, read_pair(TIME));
	} else {
		alarm_looks = 0;
		return;
	}
	write32(rtc + CONTROL, 0);
	write32(rtc + STATUS, FIRED);
	alarm_at = 0;
}

/* The number of the last tick is in the rtc as well as in memory: neither may be older than the other. */
void scratch_set(u64 tick)
{
	if (rtc)
		write32(rtc + SCRATCH, (u32)tick);
}

void scratch_check(u64 tick)
{
	if (!rtc)
		return;

	u32 got = read32(rtc + SCRATCH);

	if (got != (u32)tick)
		corrupt("scratch", SCRATCH, (u32)tick, got);
}
