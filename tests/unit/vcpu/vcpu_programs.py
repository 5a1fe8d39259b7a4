"""Small x86-64 programs for the processor's tests: bytes, so that no assembler is needed. They are loaded at 1 MiB.

All but the last ones run for ever, and take their randomness from eax.
"""

from __future__ import annotations

#: Stores anywhere, across cache lines and pages too.
#: 1: imul $1103515245,%eax,%eax; add $12345,%eax; mov %eax,%ebx; and $0xfffff,%ebx;
#: mov %rax,0x200000(%rbx); jmp 1b
STORES = bytes.fromhex("69c06d4ec641053930000089c381e3ffff0f0048898300002000ebe4")

#: Reads many pages, now and then writes to one that was read before.
#: 1: imul $1103515245,%eax,%eax; add $12345,%eax; mov %eax,%ebx; shr $8,%ebx; and $0xfffff,%ebx;
#: mov 0x200000(%rbx),%ecx; add $1,%ecx; test $0x700000,%eax; jnz 1b; mov %ecx,0x200000(%rbx); jmp 1b
READS_THEN_WRITES = bytes.fromhex(
    "69c06d4ec641053930000089c3c1eb0881e3ffff0f008b8b0000200083c101a90000700075da898b00002000ebd2"
)

#: Every store lies on two pages.
#: 1: imul $1103515245,%eax,%eax; add $12345,%eax; mov %eax,%ebx; and $0xff000,%ebx;
#: mov %rax,0x200ffc(%rbx); jmp 1b
PAGE_CROSSINGS = bytes.fromhex("69c06d4ec641053930000089c381e300f00f00488983fc0f2000ebe4")

#: Where carrying out an instruction twice is seen.
#: 1: imul $1103515245,%eax,%eax; add $12345,%eax; mov %eax,%ebx; shr $6,%ebx; and $0xfffff,%ebx;
#: incb 0x200000(%rbx); lock incl 0x200004(%rbx); mov %eax,%edx; lock xadd %edx,0x200108(%rbx);
#: mov %eax,%ecx; lock cmpxchg %edx,0x200010(%rbx); mov %ecx,%eax; xchg %rdx,0x200018(%rbx);
#: btsl $5,0x200030(%rbx); adc %edx,0x200040(%rbx); jmp 1b
READ_MODIFY_WRITE = bytes.fromhex(
    "69c06d4ec641053930000089c3c1eb0681e3ffff0f00fe8300002000f0ff830400200089c2f00fc1930801200089c1f0"
    "0fb1931000200089c8488793180020000fbaab3000200005119340002000ebb0"
)

#: rep stos and rep movs, forwards.
#: 1: imul $1103515245,%eax,%eax; add $12345,%eax; mov %eax,%edi; and $0xffff8,%edi; add $0x200000,%edi;
#: mov $90,%ecx; rep stosq; mov %edi,%esi; mov %eax,%edi; shr $7,%edi; and $0x7ffff,%edi;
#: add $0x200000,%edi; mov $70,%ecx; rep movsb; jmp 1b
STRINGS = bytes.fromhex(
    "69c06d4ec641053930000089c781e7f8ff0f0081c700002000b95a000000f348ab89fe89c7c1ef0781e7ffff070081c7"
    "00002000b946000000f3a4ebc3"
)

#: SSE stores and fxsave.
#: 1: imul $1103515245,%eax,%eax; add $12345,%eax; mov %eax,%ebx; and $0xfffff,%ebx; movd %eax,%xmm3;
#: paddd %xmm3,%xmm4; movdqu %xmm4,0x200000(%rbx); movq %xmm3,0x200100(%rbx); and $~511,%ebx;
#: fxsave 0x280000(%rbx); jmp 1b
VECTORS = bytes.fromhex(
    "69c06d4ec641053930000089c381e3ffff0f00660f6ed8660ffee3f30f7fa300002000660fd69b0001200081e300feff"
    "ff0fae8300002800ebc6"
)

#: Pushes, calls, pops and enter on a stack that jumps about.
#: 1: imul $1103515245,%eax,%eax; add $12345,%eax; mov %eax,%esp; and $0xffff8,%esp; add $0x201000,%esp;
#: push %rax; call 2f; 2: pushf; pop %rcx; pushq 16(%rsp); popq 32(%rsp); enter $16,$0; jmp 1b
STACK = bytes.fromhex(
    "69c06d4ec641053930000089c481e4f8ff0f0081c40010200050e8000000009c59ff7424108f442420c8100000ebd1"
)

#: Writes code and calls it.
#: mov $0x300000,%esp; 1: imul $1103515245,%eax,%eax; add $12345,%eax; mov %eax,%ebx; shr $3,%ebx;
#: and $0xfff00,%ebx; movb $0xc3,0x200000(%rbx); lea 0x200000(%rbx),%rdx; call *%rdx;
#: movb $0x90,0x200000(%rbx); movb $0xc3,0x200001(%rbx); call *%rdx; jmp 1b
ITS_OWN_CODE = bytes.fromhex(
    "bc0000300069c06d4ec641053930000089c3c1eb0381e300ff0f00c68300002000c3488d9300002000ffd2c683000020"
    "0090c68301002000c3ffd2ebc8"
)

#: Reads and writes a window at 0xd0000000, and counts in memory what it does there.
#: mov $0xd0000000,%ebx; mov $0x300000,%esp; 1: mov %eax,(%rbx); addl $1,0x200000; mov 4(%rbx),%ecx;
#: add %rcx,0x200008; push %rax; mov 8(%rbx),%rax; pop %rdx; add %rax,%r9; movzbl 16(%rbx),%eax;
#: lea 1(%rdx),%eax; mov %ax,20(%rbx); jmp 1b
DEVICE = bytes.fromhex(
    "bb000000d0bc00003000890383042500002000018b4b0448010c250800200050488b43085a4901c10fb643108d420166"
    "894314ebd5"
)

#: Counts in memory and in rax, for ever.
#: 1: incq 0x200000; inc %rax; jmp 1b
COUNT = bytes.fromhex("48ff04250000200048ffc0ebf3")

#: Asks the platform page to sleep for ever.
#: mov $0xfee00008,%ebx; 1: movl $100000,(%rbx); inc %rax; jmp 1b
SLEEP = bytes.fromhex("bb0800e0fec703a086010048ffc0ebf5")

#: mov $0xfee0000c,%ebx; movl $7,(%rbx); jmp .
POWER_OFF = bytes.fromhex("bb0c00e0fec70307000000ebfe")

#: They write memory, each in its own way.
WRITERS = {
    "stores": STORES,
    "reads_then_writes": READS_THEN_WRITES,
    "page_crossings": PAGE_CROSSINGS,
    "read_modify_write": READ_MODIFY_WRITE,
    "strings": STRINGS,
    "vectors": VECTORS,
    "stack": STACK,
    "its_own_code": ITS_OWN_CODE,
}
