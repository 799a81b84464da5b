// The smallest guest: says FIRST on COM1 with its first instructions, then halts for ever. For measuring how long a
// machine takes to come to its first instruction. Entered by PVH in 32-bit protected mode.

    .section .note.Xen, "a", @note
    .long 4, 4, 18                      // name size, content size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start32

    .section .text.boot, "ax"
    .code32
    .globl start32
start32:
    mov $0x3f8, %dx
    mov $text, %esi
1:  lodsb
    test %al, %al
    jz 2f
    out %al, %dx
    jmp 1b
2:  cli
    hlt
    jmp 2b

    .section .rodata
text:
    .asciz "FIRST\r\n"
