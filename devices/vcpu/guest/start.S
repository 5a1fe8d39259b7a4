/* Where execution begins, and the registers that C does not touch (it is compiled with -mgeneral-regs-only): they are
   filled once and looked at in every tick, because they move with the machine too. */

#define STACK_TOP 0x200000
#define PATTERN 0x0123456789abcdef
#define STEP 0x1111
#define MXCSR 0x7fa0 /* flush to zero off, round to zero, all masked, the precision flag set */
#define MSR_FS_BASE 0xc0000100
#define MSR_GS_BASE 0xc0000101
#define FS_BASE 0x1122334455
#define GS_BASE 0x66778899aa

	.section .text.start
	.globl start
start:
	mov	$STACK_TOP, %esp
	call	registers_fill
	call	main
1:	jmp	1b

	.text
	/* Each xmm register: a pattern in the low half, its complement in the high half. */
registers_fill:
	sub	$24, %rsp
	mov	$PATTERN, %rax
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	mov	%rax, (%rsp)
	not	%rax
	mov	%rax, 8(%rsp)
	movdqu	(%rsp), %xmm\n
	add	$STEP, %rax
	.endr
	movl	$MXCSR, (%rsp)
	ldmxcsr	(%rsp)
	mov	$MSR_FS_BASE, %ecx
	mov	$FS_BASE, %rax
	call	write_msr
	mov	$MSR_GS_BASE, %ecx
	mov	$GS_BASE, %rax
	call	write_msr
	add	$24, %rsp
	ret

write_msr:
	mov	%rax, %rdx
	shr	$32, %rdx
	wrmsr
	ret

	/* int registers_check(u64 *want, u64 *got): 0, or which one is off: 1-16 xmm0-xmm15, 17 mxcsr, 18 FS base, 19 GS
	   base. */
	.macro expect_in_rax value
	cmp	\value, %rax
	jne	off
	.endm

	.globl registers_check
registers_check:
	sub	$24, %rsp
	xor	%r9d, %r9d
	mov	$PATTERN, %r8
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	inc	%r9d
	movdqu	%xmm\n, (%rsp)
	mov	(%rsp), %rax
	expect_in_rax %r8
	not	%r8
	mov	8(%rsp), %rax
	expect_in_rax %r8
	add	$STEP, %r8
	.endr
	inc	%r9d
	mov	$MXCSR, %r8d
	stmxcsr	(%rsp)
	mov	(%rsp), %eax
	expect_in_rax %r8
	inc	%r9d
	mov	$FS_BASE, %r8
	mov	$MSR_FS_BASE, %ecx
	call	read_msr
	expect_in_rax %r8
	inc	%r9d
	mov	$GS_BASE, %r8
	mov	$MSR_GS_BASE, %ecx
	call	read_msr
	expect_in_rax %r8
	xor	%r9d, %r9d
off:
	mov	%r8, (%rdi)
	mov	%rax, (%rsi)
	mov	%r9d, %eax
	add	$24, %rsp
	ret

read_msr:
	rdmsr
	shl	$32, %rdx
	or	%rdx, %rax
	ret
