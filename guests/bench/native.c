// Runs the kernels' flat binary in a host process, at the same addresses as in the guest, and
// prints the same lines: the judge of results and of speed.
//
//     usage: native KERNELS.bin COUNT

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

static void *map(unsigned long at, unsigned long size, int rights)
{
    void *memory = mmap((void *)at, size, rights,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("native: mmap");
        exit(1);
    }
    return memory;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: native KERNELS.bin COUNT\n");
        return 2;
    }
    setlinebuf(stdout); // the reader takes the time of each line
    void *code = map(0x200000, 0x200000, PROT_READ | PROT_WRITE | PROT_EXEC);
    map(0x1000000, 0x1000000, PROT_READ | PROT_WRITE);
    int file = open(argv[1], O_RDONLY);
    if (file < 0 || read(file, code, 0x200000) <= 0) {
        perror(argv[1]);
        return 1;
    }
    unsigned long (*run_kernel)(unsigned long, unsigned long) = code;
    for (int index = 0; index < atoi(argv[2]); index++) {
        for (int run = 0; run < 3; run++) {
            unsigned long start = __rdtsc();
            unsigned long result = run_kernel(index, 1);
            unsigned long end = __rdtsc();
            printf("LODGE-BENCH kernel=%x ticks=%lx result=%lx\n", index, end - start, result);
        }
    }
    puts("LODGE-BENCH done");
}
