/* The UART: lines of text out, and now and then bytes through its loopback that stay in the receive FIFO for a tick. */

#include "guest.h"

enum { THR = 0, RBR = 0, FCR = 2, MCR = 4, LSR = 5 };
enum { FCR_ON_AND_EMPTY = 0x07, MCR_DTR_RTS = 0x03, MCR_LOOP = 0x10 };
enum { LSR_READY = 0x01, LSR_OVERRUN = 0x02, LSR_THR_EMPTY = 0x20, LSR_IDLE = 0x40 };
enum { FIFO = 16, MOST_CORRUPT = 200 };

static u64 uart;
static u32 room; /* bytes that the transmit FIFO takes for certain */
static u32 reports;
static u32 left; /* bytes that are in the receive FIFO */
static u8 left_seed;

static u8 uart_read(u32 offset) { return *(volatile u8 *)(uart + offset); }
static void uart_write(u32 offset, u8 value) { *(volatile u8 *)(uart + offset) = value; }

void console_open(void)
{
	uart = boot_device("uart16550").registers;
	if (uart) {
		uart_write(FCR, FCR_ON_AND_EMPTY);
		uart_write(MCR, MCR_DTR_RTS);
	}
}

static void put(char c)
{
	if (!uart)
		return;
	if (!room) {
		while (!(uart_read(LSR) & LSR_THR_EMPTY))
			;
		room = FIFO;
	}
	room--;
	uart_write(THR, (u8)c);
}

void say(const char *text)
{
	while (*text)
		put(*text++);
}

void say_number(u64 value)
{
	char digits[20];
	u32 n = 0;

	do
		digits[n++] = (char)('0' + value % 10);
	while (value /= 10);
	put(' ');
	while (n)
		put(digits[--n]);
}

void say_end(void) { put('\n'); }

void corrupt(const char *what, u64 where, u64 want, u64 got)
{
	if (reports++ >= MOST_CORRUPT)
		return;
	say("CORRUPT ");
	say(what);
	say_number(where);
	say_number(want);
	say_number(got);
	say_end();
}

static u8 looped(u32 i) { return (u8)(left_seed * 31 + i * 7 + 1); }

void loopback_leave(u64 tick)
{
	if (!uart || left)
		return;
	while (!(uart_read(LSR) & LSR_IDLE))
		;
	left_seed = (u8)tick;
	left = 1 + (u32)(tick % (FIFO - 1));
	uart_write(MCR, MCR_DTR_RTS | MCR_LOOP);
	for (u32 i = 0; i < left; i++)
		uart_write(THR, looped(i));
	uart_write(MCR, MCR_DTR_RTS);
	room = 0;
}

void loopback_check(void)
{
	u32 status;

	if (!left)
		return;
	for (u32 i = 0; i < left; i++) {
		status = uart_read(LSR);
		if (!(status & LSR_READY)) {
			corrupt("uart_lost", i, left, i);
			left = 0;
			return;
		}
		u8 got = uart_read(RBR);

		if (got != looped(i))
			corrupt("uart_byte", i, looped(i), got);
	}
	left = 0;
	status = uart_read(LSR);
	if (status & LSR_READY)
		corrupt("uart_extra", 0, 0, uart_read(RBR));
	if (status & LSR_OVERRUN)
		corrupt("uart_overrun", 0, 0, 1);
}
