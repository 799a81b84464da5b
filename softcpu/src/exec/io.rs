//! Ports: IN, OUT, INS, OUTS, with IOPL, the TSS's permission map and I/O breakpoints.

use iced_x86::{Instruction, Mnemonic as M};

use super::operand::{self, is_register, reg, set_reg, store};
use super::string::{Shape, repeat};
use super::task;
use crate::fault::{Exec, Fault};
use crate::state::{Cpu, cr, reg as r};

/// Bytes that a repeated port instruction moves before interrupts get a chance: a sector, as devices' calls are slow.
const BUDGET: u64 = 512;

/// Executes a port instruction; none if it is not one.
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Option<Exec> {
    Some(match insn.mnemonic() {
        M::In => input(cpu, insn),
        M::Out => output(cpu, insn),
        M::Insb => ins(cpu, insn, 1),
        M::Insw => ins(cpu, insn, 2),
        M::Insd => ins(cpu, insn, 4),
        M::Outsb => outs(cpu, insn, 1),
        M::Outsw => outs(cpu, insn, 2),
        M::Outsd => outs(cpu, insn, 4),
        _ => return None,
    })
}

/// #GP(0) unless the code may access `size` ports from `port`.
fn check_port(cpu: &mut Cpu, port: u16, size: usize) -> Exec {
    let free = !cpu.mode.protected || !cpu.mode.v86 && cpu.mode.cpl <= cpu.iopl();
    if !free && !task::io_map_allows(cpu, port, size)? {
        return Err(Fault::GP0);
    }
    Ok(())
}

/// Notes I/O breakpoints (CR4.DE) that an access hits; the trap comes after the instruction.
fn watch_port(cpu: &mut Cpu, port: u16, size: usize) {
    if cpu.dr[7] & 0xff == 0 || cpu.cr4 & cr::CR4_DE == 0 {
        return;
    }
    for i in 0..4 {
        let control = cpu.dr[7] >> (16 + 4 * i);
        let enabled = cpu.dr[7] >> (2 * i) & 3 != 0 && control & 3 == 2;
        let length = [1, 2, 8, 4][(control >> 2 & 3) as usize];
        let (at, port) = (cpu.dr[i] & !(length - 1), u64::from(port));
        if enabled && port < at.wrapping_add(length) && at < port + size as u64 {
            cpu.pending_debug |= 1 << i;
            cpu.leave = true;
        }
    }
}

fn read_port(cpu: &mut Cpu, port: u16, size: usize) -> u64 {
    let mut bytes = [0; 8];
    cpu.port_read(port, &mut bytes[..size]);
    watch_port(cpu, port, size);
    u64::from_le_bytes(bytes)
}

fn write_port(cpu: &mut Cpu, port: u16, size: usize, value: u64) {
    cpu.port_write(port, &value.to_le_bytes()[..size]);
    watch_port(cpu, port, size);
}

/// The port of IN and OUT: an immediate or DX.
fn port_operand(cpu: &Cpu, insn: &Instruction, i: u32) -> u16 {
    if is_register(insn, i) { cpu.regs[r::RDX] as u16 } else { insn.immediate8().into() }
}

fn input(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let (port, size) = (port_operand(cpu, insn, 1), insn.op0_register().size());
    check_port(cpu, port, size)?;
    let value = read_port(cpu, port, size);
    set_reg(cpu, r::RAX, size, value);
    Ok(())
}

fn output(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let (port, size) = (port_operand(cpu, insn, 0), insn.op1_register().size());
    check_port(cpu, port, size)?;
    let value = reg(cpu, r::RAX, size);
    write_port(cpu, port, size, value);
    Ok(())
}

/// INS: the destination is checked before the port is read, so that a fault loses nothing.
fn ins(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Exec {
    let shape = Shape { budget: BUDGET, ..Shape::new(cpu, insn, size) };
    let port = cpu.regs[r::RDX] as u16;
    repeat(cpu, insn, shape, |cpu, _| {
        check_port(cpu, port, size)?;
        let lin = shape.element(cpu, r::RDI, true)?;
        let access = cpu.access(true);
        cpu.translate(lin, access)?;
        cpu.translate(cpu.table_address(lin, size as u64 - 1), access)?;
        let value = read_port(cpu, port, size);
        store(cpu, lin, size, value)?;
        shape.advance(cpu, r::RDI, 1);
        Ok((1, false))
    })
}

fn outs(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Exec {
    let shape = Shape { budget: BUDGET, ..Shape::new(cpu, insn, size) };
    let port = cpu.regs[r::RDX] as u16;
    repeat(cpu, insn, shape, |cpu, _| {
        check_port(cpu, port, size)?;
        let lin = shape.element(cpu, r::RSI, false)?;
        let value = operand::load(cpu, lin, size)?;
        write_port(cpu, port, size, value);
        shape.advance(cpu, r::RSI, 1);
        Ok((1, false))
    })
}
