/* What a block of a disk holds after an operation on it. It follows from the number of the operation, the block and the seed of this
   boot: so whoever has the image and the number of the last operation that lasts can check it.

   A sector (64 words): operation << 32 | number of the sector; the seed; then words as pages have them. */

#include "guest.h"

enum { SECTOR = 512, WORDS = SECTOR / 8, SECTORS = BLOCK / SECTOR };

#define STEP 0x9e3779b97f4a7c15UL

static u64 name_of(u32 block, u32 number, u32 sector) { return (u64)number << 32 | (block * SECTORS + sector); }
static u64 seed_of(u64 name, u32 boot) { return mix(name ^ (u64)boot << 16) | 1; }

void block_fill(u64 *word, u32 block, u32 number, u32 boot)
{
	for (u32 sector = 0; sector < SECTORS; sector++) {
		u64 name = name_of(block, number, sector), value = seed_of(name, boot), *end = word + WORDS;

		*word++ = name;
		*word++ = boot;
		for (; word < end; word += 2, value += 2 * STEP) {
			word[0] = value;
			word[1] = value + STEP;
		}
	}
}

void block_verify(const struct block_words *words, const u64 *word, u32 block, u32 number, u32 boot, int zero)
{
	for (u32 sector = 0; sector < SECTORS; sector++) {
		u64 name = zero ? 0 : name_of(block, number, sector), value = zero ? 0 : seed_of(name, boot);
		u64 step = zero ? 0 : STEP, difference = (word[0] ^ name) | (word[1] ^ (zero ? 0 : boot));
		const u64 *end = word + WORDS;

		if (difference)
			corrupt(words->sector, block * SECTORS + sector, name, word[0]);
		difference = 0;
		for (word += 2; word < end; word += 2, value += 2 * step)
			difference |= (word[0] ^ value) | (word[1] ^ (value + step));
		if (difference)
			corrupt(words->data, block * SECTORS + sector, number, difference);
	}
}
