/* The working set. A page's content follows from its number and its generation, and the generations are kept elsewhere in
   memory: a page that was lost, or is older than it should be, is found the next time it is looked at.

   generation 0      never written: all zero
   every eighth      all zero again
   any other         seed, seed + STEP, seed + 2 STEP, … in one word of every `stride` bytes

   An access to memory costs some 20 ns here and any other instruction 5 ns, so the loops are unrolled and without branches. */

#include "guest.h"

#define STEP 0x9e3779b97f4a7c15UL
#define MAX_STRIDE 64 /* words: then a page is one turn of the loops */

u64 page_count;
u64 rewritten; /* since boot: what the generations must add up to */
static u32 *const generations = (u32 *)GENERATIONS;
u64 pages_batch;
static u64 stride; /* in words, a power of two */
static u64 random = 88172645463325252UL;
static u64 swept; /* where the sweep is */
static u64 swept_sum; /* of the generations behind it, as they are now */

u64 mix(u64 x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9UL;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebUL;
	return x ^ x >> 31;
}

static u64 seed(u64 page, u32 generation) { return mix((u64)generation << 32 | page) | 1; }
static int zero(u32 generation) { return generation % 8 == 0; }

void pages_open(void)
{
	u64 most = (ram_size - WORKING_SET) / PAGE;
	u64 wanted = boot_option("span", 64) << 20;

	page_count = wanted / PAGE;
	if (page_count > most)
		page_count = most;
	if (page_count > (WORKING_SET - GENERATIONS) / sizeof *generations)
		page_count = (WORKING_SET - GENERATIONS) / sizeof *generations;
	for (stride = 1; stride < MAX_STRIDE && stride * 8 < boot_option("stride", 8);)
		stride *= 2;
	pages_batch = 64 * stride;
}

static u64 *at(u64 page) { return (u64 *)(WORKING_SET + page * PAGE); }

#define EIGHT_TIMES(x) x x x x x x x x

static void find_difference(u64 page, u64 want, u64 step)
{
	for (u64 *word = at(page), *end = word + PAGE / 8; word < end; word += stride, want += step)
		if (*word != want) {
			corrupt("page", (u64)word, want, *word);
			return;
		}
}

static int check(u64 page)
{
	u32 generation = generations[page];
	u64 step = zero(generation) ? 0 : STEP;
	u64 first = zero(generation) ? 0 : seed(page, generation);
	u64 want = first, difference = 0;

	for (u64 *word = at(page), *end = word + PAGE / 8; word < end;) {
		EIGHT_TIMES(difference |= *word ^ want; word += stride; want += step;)
	}
	if (difference)
		find_difference(page, first, step);
	return !difference;
}

static void rewrite(u64 page)
{
	u32 generation = ++generations[page];
	u64 step = zero(generation) ? 0 : STEP;
	u64 value = zero(generation) ? 0 : seed(page, generation);

	for (u64 *word = at(page), *end = word + PAGE / 8; word < end;) {
		EIGHT_TIMES(*word = value; word += stride; value += step;)
	}
	rewritten++;
	if (page < swept)
		swept_sum++;
}

/* Pages at random; what is rewritten is checked first. */
void pages_rewrite(u64 count)
{
	if (!page_count)
		return;
	while (count--) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;

		u64 page = random % page_count;

		check(page);
		rewrite(page);
	}
}

/* All pages in turn. The sum finds a page and its generation that are both older than they should be. */
void pages_sweep(u64 count)
{
	if (!page_count)
		return;
	while (count--) {
		if (!check(swept))
			rewrite(swept);
		swept_sum += generations[swept++];
		if (swept == page_count) {
			if (swept_sum != rewritten)
				corrupt("generations", GENERATIONS, rewritten, swept_sum);
			rewritten = swept_sum;
			swept = swept_sum = 0;
		}
	}
}
