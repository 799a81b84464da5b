//! Ports above IOPL: the I/O permission map of the TSS (SDM volume 1, 19.5.2).

use crate::guest::{GDT, Guest, Mode, TSS, sel, x86};
use crate::{BOTH, in_modes};
use iced_x86::code_asm::*;

/// Where the map may lie, beside the usual 68H.
const MAP: u32 = 0x68;

/// A TSS of `limit` whose map is at `map`; EAX is lost.
fn set_tss(g: &mut Guest, limit: u32, map: u32) {
    g.poke(GDT + sel::TSS, TSS << 16 | limit);
    g.poke(GDT + sel::TSS + 4, 0x8900);
    g.poke(TSS + 0x64, map << 16);
    x86!(&mut g.a, mov eax, sel::TSS; ltr ax;);
}

type Emit = fn(&mut CodeAssembler);

/// By EDX; nobody is at these ports.
const ACCESSES: [Emit; 7] = [
    |a| a.in_(al, dx).unwrap(),
    |a| a.in_(ax, dx).unwrap(),
    |a| a.in_(eax, dx).unwrap(),
    |a| a.out(dx, al).unwrap(),
    |a| a.out(dx, ax).unwrap(),
    |a| a.out(dx, eax).unwrap(),
    |a| a.insb().unwrap(),
];

fn access(g: &mut Guest, port: u32, iopl: u32, emit: Emit) {
    let alias = g.mode.alias();
    g.attempt(|g| {
        g.user(iopl << 12 | 2, |g| {
            x86!(&mut g.a, mov edx, port; mov edi, 0xe000 + alias;);
            emit(&mut g.a);
        })
    });
}

#[test]
fn permission_map() {
    in_modes("ports", &BOTH, |g| {
        // Ports 500H to 527H are bytes A0H to A4H of the map.
        set_tss(g, MAP + 0xa5, MAP);
        let bytes = TSS + MAP + 0xa0;
        for (low, high) in [(0u32, 0xffu32), (0x0100_0001, 0), (0x8180_7ffe, 0), (u32::MAX, 0xff)] {
            g.poke(bytes, low);
            g.poke(bytes + 4, high);
            for port in [0x500u32, 0x501, 0x507, 0x508, 0x50f, 0x51e, 0x51f] {
                for emit in ACCESSES {
                    access(g, port, 0, emit);
                }
            }
        }
        access(g, 0x500, 2, ACCESSES[0]);
        access(g, 0x500, 3, ACCESSES[0]);
    });
}

#[test]
fn ends_of_the_map() {
    in_modes("ports-end", &BOTH, |g| {
        // All of the map's bytes allow; where it ends counts. Two bytes are looked at, whatever the ports.
        for at in (0x68..0x118).step_by(4) {
            g.poke(TSS + at, 0);
        }
        for (limit, map) in [
            (MAP + 0xa0, MAP),
            (MAP + 0xa1, MAP),
            (MAP + 0xa2, MAP),
            (0x67, MAP),
            (0x67, 0),
            (0x67, 0x20),
            (0x67, 0xffff),
            (0x10f, 0xff00),
            (0x10f, 0x10f),
        ] {
            set_tss(g, limit, map);
            for port in [0u32, 0x500, 0x506, 0x507, 0x508, 0xfff8, 0xffff] {
                // Port 0 is somebody's: only where it is refused, or read.
                access(g, port, 0, ACCESSES[0]);
                access(g, port, 0, ACCESSES[1]);
            }
        }
        // 16-bit segments have none.
        if g.mode == Mode::Flat {
            set_tss(g, 0x10f, MAP);
            // SP0 and SS0 of 16 bits.
            g.poke(TSS, 0xc000 << 16);
            g.poke(TSS + 4, sel::DATA);
            g.poke(GDT + sel::TSS + 4, 0x8100);
            x86!(&mut g.a, mov eax, sel::TSS; ltr ax;);
            access(g, 0x500, 0, ACCESSES[0]);
        }
    });
}
