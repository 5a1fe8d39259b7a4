/* The display: tiles that are filled in turn. Before a tile is filled anew, its checksum says whether the old fill is there. */

#include "guest.h"

enum {
	STRIDE = 0x10, X = 0x18, Y = 0x1c, W = 0x20, H = 0x24, COLOUR = 0x30, COMMAND = 0x34, STATUS = 0x38,
	FRAMES = 0x40, FENCE_GPA = 0x48, FENCE_VALUE = 0x50, CHECKSUM = 0x58
};
enum { FILL = 1, SUM = 3 };
enum { DONE = 1, REFUSED = 2 };
enum { COLUMNS = 4, ROWS = 12, TILE_W = 256, TILE_H = 64, TILES = COLUMNS * ROWS };

static u64 display, every;
static u32 line;
static u32 frames;
static u64 fences;
static u32 colours[TILES];

void screen_open(void)
{
	struct device device = boot_device("display");

	display = device.registers;
	line = 1u << device.irq;
	every = boot_option("draw", 8);
	if (!display)
		return;
	write32(display + STATUS, DONE | REFUSED);
	write32(display + W, TILE_W);
	write32(display + H, TILE_H);
	write32(display + FENCE_GPA, FENCE);
	write32(display + FENCE_GPA + 4, 0);
	write32(display + FENCE_VALUE + 4, 0);
	frames = read32(display + FRAMES);
	pending_clear(line);
}

/* Its end is seen in three places, all of which must be there when the write to COMMAND is over. */
static void carry_out(u32 command, u32 tile)
{
	volatile u64 *fence = (volatile u64 *)FENCE;

	write32(display + FENCE_VALUE, (u32)++fences);
	write32(display + COMMAND, command);
	if (*fence != (u32)fences)
		corrupt("fence", tile, (u32)fences, *fence);
	if (!(pending() & line))
		corrupt("display_irq", tile, line, 0);
	pending_clear(line);
	if (read32(display + STATUS) != DONE)
		corrupt("display_status", tile, DONE, read32(display + STATUS));
	write32(display + STATUS, DONE | REFUSED);
}

void screen_step(u64 tick)
{
	if (!display || !every || tick % every)
		return;

	u32 tile = (u32)(tick / every % TILES);

	write32(display + X, tile % COLUMNS * TILE_W);
	write32(display + Y, tile / COLUMNS * TILE_H);
	carry_out(SUM, tile);

	u64 got = read32(display + CHECKSUM) | (u64)read32(display + CHECKSUM + 4) << 32;
	u64 want = (u64)colours[tile] * TILE_W * TILE_H;

	if (got != want)
		corrupt("vram", tile, want, got);
	colours[tile] = (u32)tick * 2654435761u | 1;
	write32(display + COLOUR, colours[tile]);
	carry_out(FILL, tile);
	if (read32(display + FRAMES) != ++frames)
		corrupt("frames", tile, frames, read32(display + FRAMES));
}
