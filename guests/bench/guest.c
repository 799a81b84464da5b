// The benchmark guest: copies the kernels to 2 MiB and runs each a few times. For each run it
// prints, to COM1 or to port 0xE9 (OUT_PORT),
//
//     LODGE-BENCH kernel=<digit> ticks=<hex> result=<hex>
//
// where ticks are of the TSC, and at the end LODGE-BENCH done. Then it leaves by the debug exit
// port 0xF4 with the value 0.

typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned char u8;

extern const u8 kernels[], kernels_end[];

enum { KERNELS_AT = 0x200000, RUNS = 3 };

static void out(unsigned short port, u8 value)
{
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

static u8 in(unsigned short port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void put(u8 c)
{
    // On COM1, wait for the transmitter (line status, bit 5); the debug console is always ready.
    if (OUT_PORT == 0x3F8)
        while (!(in(0x3F8 + 5) & 0x20))
            ;
    out(OUT_PORT, c);
}

static void text(const char *s)
{
    while (*s)
        put((u8)*s++);
}

static void hex(u64 value)
{
    int shift = 60;
    while (shift > 0 && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put((u8) "0123456789abcdef"[(value >> shift) & 15]);
}

static u64 ticks(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

void guest_main(void)
{
    u8 *to = (u8 *)KERNELS_AT;
    for (const u8 *from = kernels; from < kernels_end; from++)
        *to++ = *from;
    u64 (*run_kernel)(u64 index, u64 times) = (void *)KERNELS_AT;
    for (int index = 0; index < KERNEL_COUNT; index++) {
        for (int run = 0; run < RUNS; run++) {
            u64 start = ticks();
            u64 result = run_kernel(index, 1);
            u64 end = ticks();
            text("LODGE-BENCH kernel=");
            hex(index);
            text(" ticks=");
            hex(end - start);
            text(" result=");
            hex(result);
            text("\n");
        }
    }
    text("LODGE-BENCH done\n");
    out(0xF4, 0);
}
