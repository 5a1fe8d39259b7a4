/* A virtio-pci function and its split virtqueues, as virtio 1.2 has them: found by its capabilities, told of by MSI-X through the
   pending register. What a request says is disk.c's. */

#include "guest.h"

enum { VENDOR_VIRTIO = 0x1af4 };
enum { PCI_COMMAND = 0x04, PCI_CAPABILITIES = 0x34, MEMORY_AND_MASTER = 0x06 };
enum { CAP_VENDOR = 0x09, CAP_MSIX = 0x11, MSIX_ENABLE = 0x8000, MSIX_ENTRY = 16 };
enum { COMMON = 1, NOTIFY = 2, DEVICE = 4 };
enum {
	FEATURE_SELECT = 0x00, FEATURE = 0x04, DRIVER_SELECT = 0x08, DRIVER_FEATURE = 0x0c, CONFIG_VECTOR = 0x10,
	NUM_QUEUES = 0x12, STATUS = 0x14, QUEUE_SELECT = 0x16, QUEUE_SIZE = 0x18, QUEUE_VECTOR = 0x1a, QUEUE_ENABLE = 0x1c,
	QUEUE_NOTIFY = 0x1e, QUEUE_DESC = 0x20, QUEUE_DRIVER = 0x28, QUEUE_DEVICE = 0x30
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { NO_VECTOR = 0xffff, NO_INTERRUPT = 1 };

static u64 common, notify, config_space, msix_table;
static u32 notify_step, msix_at, msix_entries;

static void find_capabilities(u64 bar)
{
	common = notify = virtio_config = msix_at = 0;
	for (u32 at = read8(config_space + PCI_CAPABILITIES); at; at = read8(config_space + at + 1)) {
		u64 cap = config_space + at;

		if (read8(cap) == CAP_MSIX) {
			msix_at = at;
			msix_entries = (read16(cap + 2) & 0x7ff) + 1u;
			msix_table = bar + (read32(cap + 4) & ~7u);
		} else if (read8(cap) == CAP_VENDOR && read8(cap + 4) == 0) {
			u64 area = bar + read32(cap + 8);

			switch (read8(cap + 3)) {
			case COMMON:
				common = area;
				break;
			case NOTIFY:
				notify = area;
				notify_step = read32(cap + 16);
				break;
			case DEVICE:
				virtio_config = area;
				break;
			}
		}
	}
}

static u64 negotiate(u64 wanted)
{
	u64 offered;

	write8(common + STATUS, 0);
	while (read8(common + STATUS))
		;
	write8(common + STATUS, ACKNOWLEDGE | DRIVER);
	write32(common + FEATURE_SELECT, 0);
	offered = read32(common + FEATURE);
	write32(common + FEATURE_SELECT, 1);
	offered |= (u64)read32(common + FEATURE) << 32;
	wanted &= offered;
	write32(common + DRIVER_SELECT, 0);
	write32(common + DRIVER_FEATURE, (u32)wanted);
	write32(common + DRIVER_SELECT, 1);
	write32(common + DRIVER_FEATURE, (u32)(wanted >> 32));
	write8(common + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
	return read8(common + STATUS) & FEATURES_OK ? wanted : 0;
}

u64 virtio_config;

u64 virtio_open(struct device device, u64 wanted)
{
	config_space = device.registers + CONFIG_SPACE;
	if (read16(config_space) != VENDOR_VIRTIO)
		return 0;
	find_capabilities(device.registers);
	if (!common || !notify || !virtio_config || !msix_at)
		return 0;
	write16(config_space + PCI_COMMAND, MEMORY_AND_MASTER);
	write16(config_space + msix_at + 2, MSIX_ENABLE);
	write16(common + CONFIG_VECTOR, NO_VECTOR);
	return negotiate(wanted | VIRTIO_VERSION_1);
}

u32 virtio_queues(void) { return read16(common + NUM_QUEUES); }

static void write64(u64 address, u64 value)
{
	write32(address, (u32)value);
	write32(address + 4, (u32)(value >> 32));
}

void queue_open(struct queue *queue, u32 number, u64 rings, u32 size, u64 features, struct device device)
{
	u32 vectors = device.vectors < msix_entries ? device.vectors : msix_entries;
	u32 vector = number % vectors;
	u64 entry = msix_table + vector * MSIX_ENTRY;

	write16(common + QUEUE_SELECT, (u16)number);
	queue->size = read16(common + QUEUE_SIZE) < size ? read16(common + QUEUE_SIZE) : size;
	queue->descriptors = (struct descriptor *)rings;
	queue->available = (volatile u16 *)(rings + queue->size * sizeof(struct descriptor));
	queue->used = rings + 0x800;
	queue->offered = queue->seen = 0;
	queue->event_idx = (features & VIRTIO_EVENT_IDX) != 0;
	queue->line = 1u << (device.irq + vector);
	queue->notify = notify + read16(common + QUEUE_NOTIFY) * notify_step;
	queue->number = (u16)number;
	for (u64 *word = (u64 *)rings; word < (u64 *)(rings + PAGE); word++)
		*word = 0;
	write64(entry, 0xfee00000);
	write32(entry + 8, device.irq + vector);
	write32(entry + 12, 0);
	write16(common + QUEUE_SIZE, (u16)queue->size);
	write16(common + QUEUE_VECTOR, (u16)vector);
	write64(common + QUEUE_DESC, (u64)queue->descriptors);
	write64(common + QUEUE_DRIVER, (u64)queue->available);
	write64(common + QUEUE_DEVICE, queue->used);
	write16(common + QUEUE_ENABLE, 1);
	pending_clear(queue->line);
}

void virtio_go(void) { write8(common + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK); }

/* What was stored is seen before anything is loaded. An emulated processor's own fence may be none; an access to the platform
   page takes locks outside. */
static void fence(void) { mask_get(); }

static volatile u16 *used_event(struct queue *queue) { return queue->available + 2 + queue->size; }
static u16 avail_event(struct queue *queue) { return read16(queue->used + 4 + 8 * queue->size); }

void queue_offer(struct queue *queue, u32 head)
{
	queue->available[2 + queue->offered % queue->size] = (u16)head;
	__asm__ volatile("" ::: "memory");
	queue->available[1] = ++queue->offered;
	queue->unsaid++;
}

void queue_notify(struct queue *queue)
{
	u16 unsaid = queue->unsaid;

	queue->unsaid = 0;
	if (!unsaid)
		return;
	fence();
	if (queue->event_idx ? (u16)(queue->offered - avail_event(queue) - 1) < unsaid : !(read16(queue->used) & 1))
		write16(queue->notify, queue->number);
}

int queue_ready(struct queue *queue) { return read16(queue->used + 2) != queue->seen; }

/* The next head that came back; -1: none, and an interrupt will come with the next. */
int queue_next(struct queue *queue, u32 *written)
{
	if (!queue_ready(queue)) {
		if (!queue->event_idx)
			return -1;
		*used_event(queue) = queue->seen;
		fence();
		if (!queue_ready(queue))
			return -1;
	}
	__asm__ volatile("" ::: "memory");

	u64 entry = queue->used + 4 + 8 * (queue->seen++ % queue->size);

	*written = read32(entry + 4);
	return (int)read32(entry);
}
