// The only program of the small Linux guest: says that user space was reached, and powers off.
// No C library, so that the RAM disk is a page or two.

static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall"
                     : "=a"(result)
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
