// The only program of the small Linux guest: says that user space was reached, and powers off.
// No C library, so that the RAM disk is a page or two.
//
// There is a KVM where SYSCALL jumps to the kernel and stays in user mode (docs/kvm.md). The kernel
// reports the fault that follows, with the stack's address: so each call is made with a stack at
// LODGE! in ASCII, and "init[1]: segfault at ... sp 00004c4f44474521" is the program's first word.

static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long stack __asm__("rbx") = 0x4c4f44474521;
    __asm__ volatile("xchg %%rsp, %1\n\t"
                     "syscall\n\t"
                     "xchg %%rsp, %1"
                     : "=a"(result), "+r"(stack)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}

enum { SYS_write = 1, SYS_reboot = 169 };

void _start(void)
{
    static const char ready[] = "LODGE-INIT-READY\n";
    call(SYS_write, 1, (long)ready, sizeof ready - 1, 0);
    // reboot(2): LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF
    call(SYS_reboot, (long)0xfee1dead, 672274793, 0x4321fedc, 0);
    for (;;)
        __asm__ volatile("pause");
}
