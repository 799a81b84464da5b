// The benchmark guest's start: PVH hands over in 32-bit protected mode with paging off (Xen's
// x86/HVM direct boot ABI); this makes 4 KiB page tables for the first 64 MiB, so that the TLB
// has work to do, goes to long mode with SSE on, and calls guest_main().

    .section .note.Xen, "a", @note
    .long 4, 4, 18                      // name size, content size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start32

    .section .rodata
    .globl kernels, kernels_end
kernels:
    .incbin KERNELS
kernels_end:

    .section .text.boot, "ax"
    .code32
    .globl start32
start32:
    cli
    mov $stack_top, %esp
    mov $pml4, %edi
    xor %eax, %eax
    mov $(4096 * (3 + 32) / 4), %ecx
    cld
    rep stosl
    movl $pdpt + 7, pml4
    movl $pd + 7, pdpt
    mov $pd, %edi
    mov $pt + 7, %eax
    mov $32, %ecx
1:  mov %eax, (%edi)                    // 32 page tables
    add $8, %edi
    add $4096, %eax
    loop 1b
    mov $pt, %edi
    mov $7, %eax
    mov $(32 * 512), %ecx
1:  mov %eax, (%edi)                    // their pages, one to one
    add $8, %edi
    add $4096, %eax
    loop 1b
    mov %cr4, %eax
    or $0x620, %eax                     // PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx               // EFER
    rdmsr
    or $0x100, %eax                     // LME
    wrmsr
    mov %cr0, %eax
    and $~0x6, %eax                     // not EM; MP is set again below
    or $0x80000003, %eax                // PG, MP, PE
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $start64

    .code64
start64:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack_top, %rsp
    call guest_main
1:  hlt
    jmp 1b

    .align 16
gdt:
    .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word 23
    .long gdt

    .section .bss
    .align 4096
pml4:   .skip 4096
pdpt:   .skip 4096
pd:     .skip 4096
pt:     .skip 4096 * 32
    .skip 65536
stack_top:
    .section .note.GNU-stack, "", @progbits
