//! Control and debug registers, XCR0, and invalidation of translations.

use iced_x86::{Instruction, OpKind, Register};

use super::operand;
use super::seg::kind;
use crate::events::DR6_BD;
use crate::fault::{Exec, Fault, vector};
use crate::mem::canonical;
use crate::state::{Cpu, cr, reg as r, seg as s};
use crate::walk::PHYSICAL_BITS;

const CR0_BITS: u64 = cr::CR0_PE
    | cr::CR0_MP
    | cr::CR0_EM
    | cr::CR0_TS
    | cr::CR0_ET
    | cr::CR0_NE
    | cr::CR0_WP
    | cr::CR0_AM
    | cr::CR0_NW
    | cr::CR0_CD
    | cr::CR0_PG;
const CR4_BITS: u64 = cr::CR4_VME
    | cr::CR4_PVI
    | cr::CR4_TSD
    | cr::CR4_DE
    | cr::CR4_PSE
    | cr::CR4_PAE
    | cr::CR4_MCE
    | cr::CR4_PGE
    | cr::CR4_PCE
    | cr::CR4_OSFXSR
    | cr::CR4_OSXMMEXCPT
    | cr::CR4_UMIP
    | cr::CR4_FSGSBASE
    | cr::CR4_PCIDE
    | cr::CR4_OSXSAVE
    | cr::CR4_SMEP
    | cr::CR4_SMAP;
/// A change of one of these makes the TLB's contents wrong (SDM volume 3, 4.10.4.1), or reloads the PDPTEs.
const CR4_PAGING: u64 =
    cr::CR4_PSE | cr::CR4_PAE | cr::CR4_PGE | cr::CR4_PCIDE | cr::CR4_SMEP | cr::CR4_SMAP;
/// MOV to CR3 with CR4.PCIDE: keep the translations of the new PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;

impl Cpu {
    /// #GP(0) unless the CPL is 0.
    #[inline]
    pub fn require_ring0(&self) -> Exec {
        if self.mode.cpl == 0 { Ok(()) } else { Err(Fault::GP0) }
    }

    /// MOV to CR0, with entry to and exit from long mode (SDM volume 3, 9.8.5).
    pub fn set_cr0(&mut self, value: u64) -> Exec {
        if value >> 32 != 0 {
            return Err(Fault::GP0);
        }
        let value = value & CR0_BITS | cr::CR0_ET;
        let has = |bit| value & bit != 0;
        if has(cr::CR0_PG) && !has(cr::CR0_PE) || has(cr::CR0_NW) && !has(cr::CR0_CD) {
            return Err(Fault::GP0);
        }
        let changed = self.cr0 ^ value;
        let mut efer = self.efer;
        if changed & cr::CR0_PG != 0 {
            if has(cr::CR0_PG) && efer & cr::EFER_LME != 0 {
                self.check_long_entry()?;
                efer |= cr::EFER_LMA;
            }
            if !has(cr::CR0_PG) {
                if self.mode.bits == 64 || self.cr4 & cr::CR4_PCIDE != 0 {
                    return Err(Fault::GP0);
                }
                efer &= !cr::EFER_LMA;
            }
        }
        let pae = self.cr4 & cr::CR4_PAE != 0 && efer & cr::EFER_LMA == 0;
        let reload = cr::CR0_PG | cr::CR0_CD | cr::CR0_NW;
        if has(cr::CR0_PG) && pae && changed & reload != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr0 = value;
        self.efer = efer;
        self.update_mode();
        if changed & (cr::CR0_PG | cr::CR0_WP | cr::CR0_PE) != 0 {
            self.flush_tlb_all();
        }
        self.leave = true;
        Ok(())
    }

    fn check_long_entry(&self) -> Exec {
        let tss16 = matches!(self.tr.kind(), kind::TSS16 | kind::TSS16_BUSY);
        let bad = self.cr4 & cr::CR4_PAE == 0 || self.segs[s::CS].long() || tss16;
        if bad { Err(Fault::GP0) } else { Ok(()) }
    }

    /// MOV to CR3.
    pub fn set_cr3(&mut self, value: u64) -> Exec {
        let pcids = self.cr4 & cr::CR4_PCIDE != 0;
        let keep = pcids && value & CR3_NO_FLUSH != 0;
        let value = if pcids { value & !CR3_NO_FLUSH } else { value };
        if self.mode.long {
            if value >> PHYSICAL_BITS != 0 {
                return Err(Fault::GP0);
            }
        } else if self.cr0 & cr::CR0_PG != 0 && self.cr4 & cr::CR4_PAE != 0 {
            self.load_pdptes(value)?;
        }
        // The TLB has no tags for PCIDs: only a load that changes nothing may keep it.
        if !keep || value != self.cr3 {
            self.flush_tlb_non_global();
        }
        self.cr3 = value;
        self.leave = true;
        Ok(())
    }

    /// MOV to CR4.
    pub fn set_cr4(&mut self, value: u64) -> Exec {
        if value & !CR4_BITS != 0 {
            return Err(Fault::GP0);
        }
        let changed = self.cr4 ^ value;
        let turned_on = changed & value;
        if self.mode.long && value & cr::CR4_PAE == 0 {
            return Err(Fault::GP0);
        }
        if turned_on & cr::CR4_PCIDE != 0 && (!self.mode.long || self.cr3 & 0xfff != 0) {
            return Err(Fault::GP0);
        }
        let pae = value & cr::CR4_PAE != 0 && !self.mode.long && self.cr0 & cr::CR0_PG != 0;
        if pae && changed & (cr::CR4_PSE | cr::CR4_PAE | cr::CR4_PGE | cr::CR4_SMEP) != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr4 = value;
        self.update_mode();
        if changed & CR4_PAGING != 0 {
            self.flush_tlb_all();
        }
        self.leave = true;
        Ok(())
    }

    /// MOV to CR8: the local APIC's task priority, bits 7:4.
    pub fn set_cr8(&mut self, value: u64) -> Exec {
        if value >> 4 != 0 {
            return Err(Fault::GP0);
        }
        let shared = self.shared.clone();
        let effect = shared.ports()[self.index as usize].lapic.set_tpr((value << 4) as u8);
        shared.apic_effect(self.index, effect);
        self.leave = true;
        Ok(())
    }

    fn cr8(&self) -> u64 {
        self.shared.ports()[self.index as usize].lapic.cr8()
    }

    /// XSETBV of XCR0.
    pub fn set_xcr0(&mut self, value: u64) -> Exec {
        let [low, _, _, high] = self.cpuid(0xd, 0);
        let known = u64::from(high) << 32 | u64::from(low);
        if value & 1 == 0 || value & !known != 0 {
            return Err(Fault::GP0);
        }
        self.xcr0 = value;
        self.leave = true;
        Ok(())
    }
}

/// The number of CR`n` or DR`n`.
fn number(register: Register, first: Register) -> usize {
    register as usize - first as usize
}

/// MOV from a control register.
pub fn mov_from_cr(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let value = match number(insn.op1_register(), Register::CR0) {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 if cpu.mode.bits == 64 => cpu.cr8(),
        _ => return Err(Fault::UD),
    };
    cpu.require_ring0()?;
    operand::set_gpr(cpu, insn.op0_register(), value);
    Ok(())
}

/// MOV to a control register.
pub fn mov_to_cr(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let register = number(insn.op0_register(), Register::CR0);
    if !matches!(register, 0 | 2 | 3 | 4 | 8) || register == 8 && cpu.mode.bits != 64 {
        return Err(Fault::UD);
    }
    cpu.require_ring0()?;
    let value = operand::gpr(cpu, insn.op1_register());
    match register {
        0 => cpu.set_cr0(value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => cpu.set_cr3(value),
        4 => cpu.set_cr4(value),
        _ => cpu.set_cr8(value),
    }
}

/// Which debug register is meant: DR4 and DR5 are DR6 and DR7, or #UD with CR4.DE.
fn debug_register(cpu: &mut Cpu, register: Register) -> Exec<usize> {
    let n = match number(register, Register::DR0) {
        4 | 5 if cpu.cr4 & cr::CR4_DE != 0 => return Err(Fault::UD),
        n @ (4 | 5) => n + 2,
        n if n < 8 => n,
        _ => return Err(Fault::UD),
    };
    cpu.require_ring0()?;
    // DR7.GD.
    if cpu.dr[7] & 1 << 13 != 0 {
        cpu.dr[6] |= DR6_BD;
        return Err(Fault::new(vector::DB));
    }
    Ok(n)
}

/// MOV from a debug register.
pub fn mov_from_dr(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let n = debug_register(cpu, insn.op1_register())?;
    operand::set_gpr(cpu, insn.op0_register(), cpu.dr[n]);
    Ok(())
}

/// MOV to a debug register.
pub fn mov_to_dr(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    let n = debug_register(cpu, insn.op0_register())?;
    let value = operand::gpr(cpu, insn.op1_register());
    if n >= 6 && value >> 32 != 0 {
        return Err(Fault::GP0);
    }
    cpu.dr[n] = match n {
        6 => value & 0xe00f | 0xffff_0ff0,
        7 => value & 0xffff_2fff | 0x400,
        _ => value,
    };
    cpu.update_mode();
    cpu.leave = true;
    Ok(())
}

/// LMSW: the low four bits of CR0; PE cannot be cleared.
pub fn lmsw(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    cpu.require_ring0()?;
    let value = match operand::is_register(insn, 0) {
        true => operand::gpr(cpu, insn.op0_register()),
        false => operand::load_operand(cpu, insn, 2)?,
    };
    let kept = cpu.cr0 & !0xf | cpu.cr0 & cr::CR0_PE;
    cpu.set_cr0(kept | value & 0xf)
}

/// SMSW: CR0, 16 bits of it to memory.
pub fn smsw(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    check_umip(cpu)?;
    let value = cpu.cr0;
    store_or_set(cpu, insn, value)
}

/// #GP(0) for SGDT, SIDT, SLDT, STR and SMSW above CPL 0 with CR4.UMIP.
pub fn check_umip(cpu: &Cpu) -> Exec {
    if cpu.cr4 & cr::CR4_UMIP != 0 { cpu.require_ring0() } else { Ok(()) }
}

/// Writes `value` to a register of any size, or 16 bits of it to memory.
pub fn store_or_set(cpu: &mut Cpu, insn: &Instruction, value: u64) -> Exec {
    if insn.op0_kind() == OpKind::Register {
        operand::set_gpr(cpu, insn.op0_register(), value);
        return Ok(());
    }
    operand::store_operand(cpu, insn, 2, value)
}

/// CLTS.
pub fn clts(cpu: &mut Cpu) -> Exec {
    cpu.require_ring0()?;
    cpu.cr0 &= !cr::CR0_TS;
    cpu.update_mode();
    cpu.leave = true;
    Ok(())
}

/// INVLPG: never faults for its operand; one that is not canonical does nothing.
pub fn invlpg(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    cpu.require_ring0()?;
    let segment = operand::segment(cpu, insn);
    let offset = operand::offset(cpu, insn);
    let base = match cpu.mode.bits {
        64 if segment < s::FS => 0,
        _ => cpu.segs[segment].base,
    };
    let lin = cpu.table_address(base, offset);
    cpu.flush_tlb_page(lin);
    cpu.leave = true;
    Ok(())
}

/// INVPCID. As the TLB holds the current PCID's translations only, the others need nothing.
pub fn invpcid(cpu: &mut Cpu, insn: &Instruction) -> Exec {
    if !cpu.has(super::Feature::Invpcid) {
        return Err(Fault::UD);
    }
    cpu.require_ring0()?;
    let kind = operand::gpr(cpu, insn.op0_register());
    let lin = operand::address(cpu, insn, 16, false)?;
    let descriptor = cpu.load::<u128>(lin)?;
    let (pcid, address) = (descriptor as u64, (descriptor >> 64) as u64);
    if kind > 3 {
        return Err(Fault::GP0);
    }
    if kind < 2 {
        let pcids = cpu.cr4 & cr::CR4_PCIDE != 0;
        if pcid >> 12 != 0 || pcid != 0 && !pcids || kind == 0 && !canonical(address) {
            return Err(Fault::GP0);
        }
        if pcids && pcid != cpu.cr3 & 0xfff {
            return Ok(());
        }
    }
    match kind {
        0 => cpu.flush_tlb_page(address),
        2 => cpu.flush_tlb_all(),
        _ => cpu.flush_tlb_non_global(),
    }
    cpu.leave = true;
    Ok(())
}

/// XGETBV.
pub fn xgetbv(cpu: &mut Cpu) -> Exec {
    if cpu.cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    if operand::reg(cpu, r::RCX, 4) != 0 {
        return Err(Fault::GP0);
    }
    cpu.regs[r::RAX] = cpu.xcr0 & 0xffff_ffff;
    cpu.regs[r::RDX] = cpu.xcr0 >> 32;
    Ok(())
}

/// XSETBV.
pub fn xsetbv(cpu: &mut Cpu) -> Exec {
    if cpu.cr4 & cr::CR4_OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    cpu.require_ring0()?;
    if operand::reg(cpu, r::RCX, 4) != 0 {
        return Err(Fault::GP0);
    }
    let value = operand::reg(cpu, r::RDX, 4) << 32 | operand::reg(cpu, r::RAX, 4);
    cpu.set_xcr0(value)
}
