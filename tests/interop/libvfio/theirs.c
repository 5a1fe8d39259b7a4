/* The device of ours.py behind libvfio-user: 16 bytes of registers at region 0, of which the upper eight are an address that as many
   bytes as the lower four say (0: one) are written to by DMA; one INTx; migration whose data is eight bytes. One client, then the end.

   cc -I DIRECTORY/include theirs.c -L DIRECTORY/build/lib -lvfio-user; its one argument is the socket's path. */

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <libvfio-user.h>

static uint8_t registers[16];
static const char state[8] = "VMFERRY!";
static size_t given;
static char bytes[1 << 20];

static void touch(vfu_ctx_t *ctx, uint64_t address)
{
	char where[dma_sg_size()];
	struct iovec view;
	uint32_t count;

	memcpy(&count, registers, sizeof count);
	count = count == 0 ? 1 : count > sizeof bytes ? sizeof bytes : count;
	if (vfu_addr_to_sgl(ctx, (vfu_dma_addr_t)address, count, (dma_sg_t *)where, 1, PROT_WRITE) != 1)
		return;
	if (vfu_sgl_get(ctx, (dma_sg_t *)where, &view, 1, 0) != 0)
		return;
	memcpy(view.iov_base, bytes, count);
	vfu_sgl_put(ctx, (dma_sg_t *)where, &view, 1);
}

static ssize_t access_registers(vfu_ctx_t *ctx, char *data, size_t count, loff_t offset, bool write)
{
	uint64_t address;

	if (!write) {
		memcpy(data, registers + offset, count);
		return count;
	}
	memcpy(registers + offset, data, count);
	if (offset == 8 && count == 8) {
		memcpy(&address, data, 8);
		touch(ctx, address);
	}
	return count;
}

static int transition(vfu_ctx_t *ctx, vfu_migr_state_t to)
{
	(void)ctx;
	if (to == VFU_MIGR_STATE_PRE_COPY || to == VFU_MIGR_STATE_STOP_AND_COPY)
		given = 0;
	return 0;
}

static ssize_t read_data(vfu_ctx_t *ctx, void *data, uint64_t count)
{
	size_t left = sizeof state - given;

	(void)ctx;
	if (count > left)
		count = left;
	memcpy(data, state + given, count);
	given += count;
	return count;
}

static ssize_t write_data(vfu_ctx_t *ctx, void *data, uint64_t count)
{
	(void)ctx;
	(void)data;
	return count;
}

static int reset(vfu_ctx_t *ctx, vfu_reset_type_t type)
{
	(void)ctx;
	if (type == VFU_RESET_DEVICE)
		memset(registers, 0, sizeof registers);
	return 0;
}

static void mapped(vfu_ctx_t *ctx, vfu_dma_info_t *info) { (void)ctx; (void)info; }

int main(int count, char **words)
{
	static const vfu_migration_callbacks_t migration = {
		.version = VFU_MIGR_CALLBACKS_VERS, .transition = transition, .read_data = read_data, .write_data = write_data,
	};
	vfu_ctx_t *ctx = count == 2 ? vfu_create_ctx(VFU_TRANS_SOCK, words[1], 0, NULL, VFU_DEV_TYPE_PCI) : NULL;

	if (!ctx || vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, 0, 0) ||
	    vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, sizeof registers, access_registers, VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM,
			     NULL, 0, -1, 0) ||
	    vfu_setup_device_reset_cb(ctx, reset) || vfu_setup_device_dma(ctx, 16, mapped, mapped) ||
	    vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1) || vfu_setup_device_migration_callbacks(ctx, &migration) ||
	    vfu_realize_ctx(ctx)) {
		perror("theirs");
		return 1;
	}
	if (vfu_attach_ctx(ctx) == 0)
		while (vfu_run_ctx(ctx) >= 0 || errno == EINTR)
			;
	vfu_destroy_ctx(ctx);
	return 0;
}
