/* The guest of `ferry demo`: its own oracle. It works, checks what it did before, numbers its ticks on the UART, and says
   CORRUPT where one thing is off. README.md has its options and what it prints. */

#include "guest.h"

#define MASKED 0x80000000u /* a line that no device of ours has: its mask bit is there to be kept */

static u64 storm, dirty, idle_ns, period;

/* A clock that ran back (which was reported) may not make this a wait of hours. */
static void wait_until(u64 due)
{
	u64 now;

	while ((now = clock_now()) < due && due - now <= period) {
		alarm_look();
		disk_look();
		scsi_look();
		if (storm)
			pages_rewrite(pages_batch);
		else
			idle((due - now < idle_ns ? due - now : idle_ns) / 1000);
	}
}

static void work(u64 pages)
{
	for (; pages; pages -= pages < pages_batch ? pages : pages_batch) {
		pages_rewrite(pages < pages_batch ? pages : pages_batch);
		clock_now();
	}
}

static void look_at_registers(void)
{
	u64 want, got;
	int which = registers_check(&want, &got);

	if (which)
		corrupt("register", (u64)which, want, got);
	if (mask_get() != MASKED)
		corrupt("mask", 0, MASKED, mask_get());
}

void main(void);
void main(void)
{
	boot_read();
	mask_set(MASKED);
	console_open();
	clock_open();
	pages_open();
	screen_open();
	storm = boot_option("storm", 0);
	dirty = boot_option("dirty", 64);
	idle_ns = boot_option("idle_us", 2000) * 1000;

	period = boot_option("tick_us", 10000) * 1000;

	u64 sweep = boot_option("check", 16);
	u64 loop = boot_option("loop", 4);
	u64 last_tick = boot_option("ticks", ~0UL);

	say("B");
	say_number(ram_size);
	say_number(device_count);
	say_number(page_count);
	say_end();
	disk_open();
	scsi_open();

	u64 due = clock_now();

	scratch_set(0);
	for (u64 tick = 1; tick <= last_tick; tick++) {
		u64 now = clock_now();

		due = due + period > now ? due + period : now;
		wait_until(due);
		scratch_check(tick - 1);
		scratch_set(tick);
		look_at_registers();
		loopback_check();
		work(storm ? 0 : dirty);
		pages_sweep(sweep);
		screen_step(tick);
		disk_look();
		disk_step();
		scsi_look();
		scsi_step();
		alarm_look();
		alarm_set(tick);
		now = clock_now();
		say("T");
		say_number(tick);
		say_number(now / 1000);
		say_number(clock_max_gap / 1000);
		say_number(clock_gap / 1000);
		say_number(rewritten);
		say_end();
		clock_gap = 0;
		clock_now();
		if (loop && tick % loop == 0)
			loopback_leave(tick);
	}
	say("DONE");
	say_end();
	power_off(0);
}
