// What the benchmark guest executes: nine small programs with integers, one with floating point
// (built with FP defined). No library, no system call: the same code runs as a flat binary at
// 2 MiB in a guest and in a host process, and works on memory from 16 MiB up to 32 MiB.
// run_kernel() is at the binary's start.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef signed int i32;
#define NOINL __attribute__((noinline))
#define MEM ((u8 *)0x1000000UL) // 16 MiB.. work area

static NOINL u64 k_alu(u64 n)
{ // register only
    u64 a = 88172645463325252UL, b = 1, c = 0;
    for (u64 i = 0; i < n; i++) {
        a ^= a << 13;
        a ^= a >> 7;
        a ^= a << 17;
        b = b * 6364136223846793005UL + a;
        c += (b >> 33) ^ (a & i);
        if (c & 0x10)
            c -= 3;
    }
    return a ^ b ^ c;
}
static NOINL u64 k_sieve(u64 n)
{ // byte stores + loads
    u8 *f = MEM;
    u64 cnt = 0, N = 1 << 18;
    for (u64 r = 0; r < n; r++) {
        for (u64 i = 0; i < N; i++)
            ((volatile u8 *)f)[i] = 1;
        for (u64 i = 2; i * i < N; i++)
            if (f[i])
                for (u64 j = i * i; j < N; j += i)
                    ((volatile u8 *)f)[j] = 0;
        for (u64 i = 2; i < N; i++)
            cnt += f[i];
    }
    return cnt;
}
static NOINL void qs(i32 *a, long lo, long hi)
{
    while (lo < hi) {
        i32 p = a[(lo + hi) >> 1];
        long i = lo, j = hi;
        while (i <= j) {
            while (a[i] < p)
                i++;
            while (a[j] > p)
                j--;
            if (i <= j) {
                i32 t = a[i];
                a[i] = a[j];
                a[j] = t;
                i++;
                j--;
            }
        }
        if (j - lo < hi - i) {
            qs(a, lo, j);
            lo = i;
        } else {
            qs(a, i, hi);
            hi = j;
        }
    }
}
static NOINL u64 k_qsort(u64 n)
{
    i32 *a = (i32 *)MEM;
    u64 s = 0;
    for (u64 r = 0; r < n; r++) {
        u32 x = 12345 + r;
        for (int i = 0; i < 65536; i++) {
            x = x * 1664525 + 1013904223;
            a[i] = x >> 1;
        }
        qs(a, 0, 65535);
        for (int i = 0; i < 65536; i += 97)
            s = s * 31 + a[i];
    }
    return s;
}
struct node {
    struct node *next;
    u64 key;
    u64 val;
};
static NOINL u64 k_list(u64 n)
{ // hash table chains, pointer chasing
    struct node **tab = (struct node **)MEM;
    struct node *pool = (struct node *)(MEM + 0x100000);
    u64 s = 0;
    u32 np = 0;
    for (int i = 0; i < 4096; i++)
        tab[i] = 0;
    u64 x = 1;
    for (int i = 0; i < 16384; i++) {
        x = x * 6364136223846793005UL + 1442695040888963407UL;
        u64 k = x >> 40;
        struct node *p = &pool[np++];
        u32 h = (k * 2654435761u) >> 20 & 4095;
        p->key = k;
        p->val = i;
        p->next = tab[h];
        tab[h] = p;
    }
    for (u64 r = 0; r < n; r++) {
        x = 1;
        for (int i = 0; i < 16384; i++) {
            x = x * 6364136223846793005UL + 1442695040888963407UL;
            u64 k = x >> 40;
            u32 h = (k * 2654435761u) >> 20 & 4095;
            for (struct node *p = tab[h]; p; p = p->next)
                if (p->key == k) {
                    s += p->val;
                    p->val++;
                    break;
                }
        }
    }
    return s;
}
static NOINL u64 fib(u64 n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static NOINL __attribute__((optimize("O1"))) u64 fibn(u64 n)
{
    if (n < 2)
        return n;
    return fibn(n - 1) + fibn(n - 2);
}
static NOINL u64 k_fib(u64 n)
{
    u64 s = 0;
    for (u64 r = 0; r < n; r++)
        s += fibn(27);
    return s;
}
// bytecode interpreter with switch (indirect jumps)
static NOINL u64 k_vm(u64 n)
{
    static const u8 prog[] = {0, 1, 2, 3, 4, 5, 1, 3, 6, 2, 4, 1, 5, 3, 2, 7};
    u64 acc = 1, b = 7;
    u64 steps = 0;
    for (u64 r = 0; r < n; r++) {
        u32 pc = 0;
        u32 cnt = 2000;
        for (;;) {
            switch (((volatile const u8 *)prog)[pc++]) {
            case 0:
                acc += 3;
                break;
            case 1:
                acc ^= b << 3;
                break;
            case 2:
                b += acc >> 5;
                break;
            case 3:
                acc = acc * 5 + 1;
                break;
            case 4:
                b ^= acc;
                break;
            case 5:
                acc -= b;
                break;
            case 6:
                acc = (acc << 7) | (acc >> 57);
                break;
            case 7:
                if (--cnt) {
                    pc = 0;
                } else
                    goto out;
                break;
            default:
                __builtin_unreachable();
            }
            steps++;
        }
    out:;
    }
    return acc ^ b ^ steps;
}
static NOINL u64 k_crc(u64 n)
{
    u32 *t = (u32 *)(MEM + 0x200000);
    u8 *d = MEM + 0x300000;
    for (u32 i = 0; i < 256; i++) {
        u32 c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xEDB88320 ^ (c >> 1) : c >> 1;
        t[i] = c;
    }
    for (u32 i = 0; i < 65536; i++)
        d[i] = i * 7 + (i >> 8);
    u32 c = ~0u;
    for (u64 r = 0; r < n; r++)
        for (u32 i = 0; i < 65536; i++)
            c = t[(c ^ d[i]) & 255] ^ (c >> 8);
    return ~c;
}
// matrix multiply int with 64-bit acc, strided access over 512 KiB
static NOINL u64 k_mat(u64 n)
{
    enum { D = 128 };
    i32 *a = (i32 *)MEM, *b = (i32 *)(MEM + 0x40000);
    u64 *c = (u64 *)(MEM + 0x80000);
    u64 s = 0;
    for (int i = 0; i < D * D; i++) {
        a[i] = i * 3 + 1;
        b[i] = i ^ 0x55;
    }
    for (u64 r = 0; r < n; r++)
        for (int i = 0; i < D; i++)
            for (int j = 0; j < D; j++) {
                u64 t = 0;
                for (int k = 0; k < D; k++)
                    t += (long)a[i * D + k] * b[k * D + j];
                c[i * D + j] = t;
                s += t;
            }
    return s;
}
// string/struct style code: memcpy-ish byte loops, strlen, compare
static NOINL u64 k_str(u64 n)
{
    u8 *s = MEM, *d = MEM + 0x10000;
    u64 h = 0;
    for (int i = 0; i < 4096; i++)
        s[i] = (i % 61) ? 'a' + (i * 7) % 26 : 0;
    for (u64 r = 0; r < n; r++) {
        u8 *p = s, *e = s + 4095, *q = d;
        while (p < e) {
            u8 *st = p;
            while (*(volatile u8 *)p)
                p++;
            u64 L = p - st;
            for (u64 i = 0; i < L; i++)
                ((volatile u8 *)q)[i] = st[i] ^ 0x20;
            u32 x = 0;
            for (u64 i = 0; i < L; i++)
                x = x * 33 + ((volatile u8 *)q)[i];
            h += x;
            p++;
            q += L;
        }
    }
    return h;
}
#ifdef FP
// double precision n-body-like + SSE2
static NOINL u64 k_fp(u64 n)
{
    double x = 0.1, y = 0.2, vx = 0.0, vy = 0.01;
    double acc = 0;
    for (u64 i = 0; i < n; i++) {
        double r2 = x * x + y * y + 0.01;
        double r = __builtin_sqrt(r2);
        double f = 1.0 / (r2 * r);
        vx -= x * f * 0.001;
        vy -= y * f * 0.001;
        x += vx * 0.001;
        y += vy * 0.001;
        acc += r;
    }
    union {
        double d;
        u64 u;
    } z;
    z.d = acc + x * y;
    return z.u;
}
#endif
typedef u64 (*kfn)(u64);
struct ent {
    kfn f;
    u64 n;
};
#ifdef FP
const struct ent table[] = {{k_fp, 3000000}};
#else
const struct ent table[] = {{k_alu, 20000000}, {k_sieve, 100}, {k_qsort, 12},
                            {k_list, 200},     {k_fib, 80},    {k_vm, 1000},
                            {k_crc, 500},      {k_mat, 30},    {k_str, 4000}};
#endif
__attribute__((section(".text.entry"))) u64 run_kernel(u64 idx, u64 mul)
{
    return table[idx].f(table[idx].n * mul);
}
