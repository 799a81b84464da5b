#!/bin/bash
# The benchmark guests, and their judge.
#
#   usage: build.sh OUT        `cargo xtask guest bench` keeps the result
#   makes  OUT/kernels.bin     nine integer programs, flat, at 2 MiB; entry(index, times)
#          OUT/fp.bin          the floating-point one, likewise
#          OUT/bench.elf, OUT/fp.elf              PVH guests that run them, output on port 0xE9
#          OUT/bench-serial.elf, OUT/fp-serial.elf                     the same, output on COM1
#          OUT/native          runs a flat binary in a host process
set -euo pipefail

out=${1:?usage: build.sh OUT}
here=$(dirname "$(readlink -f "$0")")
command -v gcc >/dev/null || { echo "guests/bench: missing tool: gcc" >&2; exit 1; }
mkdir -p "$out"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

# Plain code at a fixed place; no red zone (the guest has one stack), nothing that calls a library.
common="-O2 -fno-pic -no-pie -mcmodel=small -mno-red-zone -ffreestanding -fno-stack-protector
    -fcf-protection=none -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns"

# flat NAME FLAGS...: the kernels as OUT/NAME.bin
flat() {
    local name=$1
    shift
    # shellcheck disable=SC2086
    gcc $common -static -nostdlib -fno-tree-vectorize -fno-math-errno -w "$@" \
        -Wl,-T,"$here/kernels.ld" -Wl,--build-id=none -Wl,--no-warn-rwx-segments \
        -Wl,-e,run_kernel -o "$work/$name.flat" "$here/kernels.c"
    objcopy -O binary "$work/$name.flat" "$out/$name.bin"
}

# guest KERNELS COUNT PORT NAME: a guest that runs OUT/KERNELS.bin
guest() {
    # shellcheck disable=SC2086
    gcc $common -c -Wall -Werror -mgeneral-regs-only -D KERNEL_COUNT="$2" -D OUT_PORT="$3" \
        -o "$work/guest.o" "$here/guest.c"
    gcc -c -DKERNELS="\"$out/$1.bin\"" -o "$work/start.o" "$here/start.S"
    ld -T "$here/guest.ld" --no-warn-rwx-segments -z noexecstack -o "$out/$4.elf" \
        "$work/start.o" "$work/guest.o"
}

flat kernels -mgeneral-regs-only
flat fp -DFP -mno-avx
for port in 0xE9 0x3F8; do
    suffix=$([ $port = 0xE9 ] || echo -serial)
    guest kernels 9 $port "bench$suffix"
    guest fp 1 $port "fp$suffix"
done
gcc -c -o "$work/first.o" "$here/first.S"
ld -T "$here/guest.ld" --no-warn-rwx-segments -z noexecstack -o "$out/first.elf" "$work/first.o"
gcc -O2 -Wall -Werror -no-pie -o "$out/native" "$here/native.c"
