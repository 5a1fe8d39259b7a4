/* The boot page, and the platform page that it names. Its command line is read at every start of the program only. */

#include "guest.h"

enum { ENTRIES = 0x20, ENTRY = 40, TYPE = 24, CMDLINE = 0x800 };
enum { PENDING = 0x00, MASK = 0x04, IDLE = 0x08, EXIT = 0x0c };

u64 ram_size;
u32 device_count;
static u64 platform;

void boot_read(void)
{
	ram_size = *(u64 *)(BOOT_PAGE + 8);
	device_count = read32(BOOT_PAGE + 16);
	platform = read32(BOOT_PAGE + 20);
}

/* A model of it may have more behind a dash: lsi53c895a-slow. */
static int is(const char *entry, const char *type)
{
	while (*type && *entry == *type)
		entry++, type++;
	return !*type && (!*entry || *entry == '-');
}

struct device boot_device(const char *type)
{
	for (u32 i = 0; i < device_count; i++) {
		const char *entry = (const char *)(u64)(BOOT_PAGE + ENTRIES + i * ENTRY);

		if (is(entry, type))
			return (struct device){ *(u64 *)(entry + TYPE), *(u32 *)(entry + TYPE + 8),
						*(u32 *)(entry + TYPE + 12) };
	}
	return (struct device){ 0, 0, 0 };
}

u64 boot_option(const char *key, u64 otherwise)
{
	const char *at = (const char *)(BOOT_PAGE + CMDLINE);

	while (*at) {
		const char *k = key;

		while (*at == ' ')
			at++;
		while (*k && *k == *at)
			k++, at++;
		if (!*k && *at == '=') {
			u64 value = 0;

			for (at++; *at >= '0' && *at <= '9'; at++)
				value = value * 10 + (u64)(*at - '0');
			return value;
		}
		while (*at && *at != ' ')
			at++;
	}
	return otherwise;
}

u32 pending(void) { return read32(platform + PENDING); }
void pending_clear(u32 lines) { write32(platform + PENDING, lines); }
void mask_set(u32 lines) { write32(platform + MASK, lines); }
u32 mask_get(void) { return read32(platform + MASK); }

void idle(u64 microseconds)
{
	write32(platform + IDLE, (u32)microseconds);
	clock_slept(microseconds);
}

_Noreturn void power_off(u32 value)
{
	for (;;)
		write32(platform + EXIT, value);
}
