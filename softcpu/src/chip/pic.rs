//! The PC's two 8259A interrupt controllers (Intel data sheet 231468) with the edge/level control
//! registers that EISA added (ports 4D0H, 4D1H).
//!
//! ```text
//!  IRQ 0,1 -------+
//!  IRQ 8..15 -> slave (A0H) -> line 2 -> master (20H) -> INTR
//!  IRQ 3..7 ------+
//! ```

/// One 8259A. The fields are its state, in the form in which it is saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pic {
    /// Last levels seen on the lines, for edges.
    pub last_irr: u8,
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// The line with the highest priority (0 unless rotated).
    pub priority_add: u8,
    /// Vector base (ICW2).
    pub irq_base: u8,
    /// The next read of the command port gives ISR instead of IRR.
    pub read_reg_select: bool,
    /// A poll command was given.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Position in the ICW sequence: 0 none, else the ICW expected minus one.
    pub init_state: u8,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Rotate on automatic EOI.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub special_fully_nested: bool,
    /// ICW4 is expected.
    pub init4: bool,
    /// Edge/level control register: lines that are level-triggered.
    pub elcr: u8,
    /// Lines that may be level-triggered.
    pub elcr_mask: u8,
}

/// The line that the slave's output is on.
const CASCADE: u8 = 2;

impl Pic {
    fn new(elcr_mask: u8) -> Self {
        Self { elcr_mask, ..Self::default() }
    }

    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << line;
        if self.elcr & bit != 0 {
            // Level: the request is there for as long as the line is up.
            if level {
                self.irr |= bit;
                self.last_irr |= bit;
            } else {
                self.irr &= !bit;
                self.last_irr &= !bit;
            }
        } else if level {
            if self.last_irr & bit == 0 {
                self.irr |= bit;
            }
            self.last_irr |= bit;
        } else {
            // The request stays latched, as in every chipset's integrated 8259A.
            self.last_irr &= !bit;
        }
    }

    /// The line of highest priority in `mask` and how far it is from the top.
    fn highest(&self, mask: u8) -> Option<(u8, u8)> {
        (mask != 0).then(|| {
            let rank = mask.rotate_right(u32::from(self.priority_add & 7)).trailing_zeros() as u8;
            ((rank + self.priority_add) & 7, rank)
        })
    }

    /// The line to be serviced next, if it may interrupt what is in service.
    fn request(&self, master: bool) -> Option<u8> {
        let (line, rank) = self.highest(self.irr & !self.imr)?;
        let mut busy = self.isr;
        if self.special_mask {
            busy &= !self.imr;
        }
        if self.special_fully_nested && master {
            busy &= !(1 << CASCADE);
        }
        match self.highest(busy) {
            Some((_, held)) if held <= rank => None,
            _ => Some(line),
        }
    }

    /// The processor has taken `line`.
    fn take(&mut self, line: u8) {
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.priority_add = (line + 1) & 7;
            }
        } else {
            self.isr |= 1 << line;
        }
        if self.elcr & 1 << line == 0 {
            self.irr &= !(1 << line);
        }
    }

    /// A byte to the command port (A0 = 0): ICW1, OCW2 or OCW3.
    fn command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.icw1(value);
        } else if value & 0x08 != 0 {
            if value & 0x04 != 0 {
                self.poll = true;
            }
            if value & 0x02 != 0 {
                self.read_reg_select = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.ocw2(value);
        }
    }

    fn icw1(&mut self, value: u8) {
        // Requests that lines still hold by level stay; edges must come anew.
        *self = Self {
            irr: self.irr & self.elcr,
            last_irr: self.last_irr & self.elcr,
            irq_base: self.irq_base,
            elcr: self.elcr,
            elcr_mask: self.elcr_mask,
            init_state: 1,
            init4: value & 1 != 0,
            ..Self::default()
        };
    }

    fn ocw2(&mut self, value: u8) {
        let line = value & 7;
        let served = self.highest(self.isr).map(|(line, _)| line);
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            // Non-specific EOI, and with rotation.
            1 | 5 => {
                if let Some(served) = served {
                    self.isr &= !(1 << served);
                    if value >> 5 == 5 {
                        self.priority_add = (served + 1) & 7;
                    }
                }
            }
            // Specific EOI, and with rotation.
            3 => self.isr &= !(1 << line),
            7 => {
                self.isr &= !(1 << line);
                self.priority_add = (line + 1) & 7;
            }
            6 => self.priority_add = (line + 1) & 7,
            _ => {}
        }
    }

    /// A byte to the data port (A0 = 1): ICW2 to ICW4, or the mask.
    fn data(&mut self, value: u8) {
        match self.init_state {
            1 => {
                self.irq_base = value & 0xf8;
                self.init_state = 2;
            }
            // How the two are wired is fixed: ICW3 changes nothing.
            2 => self.init_state = if self.init4 { 3 } else { 0 },
            3 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.init_state = 0;
            }
            _ => self.imr = value,
        }
    }
}

/// The pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PicPair {
    /// Master and slave.
    pub pics: [Pic; 2],
}

impl Default for PicPair {
    fn default() -> Self {
        Self { pics: [Pic::new(0xf8), Pic::new(0xde)] }
    }
}

impl PicPair {
    /// Sets the level of IRQ line `irq` (0..16; 2 is the cascade and not connected).
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        if irq != CASCADE {
            self.pics[usize::from(irq >> 3 & 1)].set_line(irq & 7, level);
        }
        self.cascade();
    }

    /// INTR: an unmasked request waits for the processor.
    pub fn output(&self) -> bool {
        self.pics[0].request(true).is_some()
    }

    fn cascade(&mut self) {
        // The slave's output is down between two requests of its, so each is an edge for the master.
        self.pics[0].set_line(CASCADE, false);
        if self.pics[1].request(false).is_some() {
            self.pics[0].set_line(CASCADE, true);
        }
    }

    /// INTA: the vector for the processor. With no request left it is IRQ 7 (15) and nothing is
    /// marked in service, as the data sheet has it ("default IR7").
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.pics[0].request(true) {
            Some(CASCADE) => {
                self.pics[0].take(CASCADE);
                let line = self.pics[1].request(false);
                if let Some(line) = line {
                    self.pics[1].take(line);
                }
                self.pics[1].irq_base | line.unwrap_or(7)
            }
            Some(line) => {
                self.pics[0].take(line);
                self.pics[0].irq_base | line
            }
            None => self.pics[0].irq_base | 7,
        };
        self.cascade();
        vector
    }

    /// Whether `port` belongs to the pair.
    pub fn claims(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
    }

    /// `IN` from one of the ports.
    pub fn read(&mut self, port: u16) -> u8 {
        if port >= 0x4d0 {
            return self.pics[usize::from(port & 1)].elcr;
        }
        let slave = usize::from(port >> 7 & 1);
        if self.pics[slave].poll {
            let value = self.poll(slave);
            self.cascade();
            return value;
        }
        let pic = &self.pics[slave];
        match (port & 1, pic.read_reg_select) {
            (1, _) => pic.imr,
            (_, true) => pic.isr,
            (_, false) => pic.irr,
        }
    }

    /// The answer to a poll command: an acknowledge by reading.
    fn poll(&mut self, which: usize) -> u8 {
        let pic = &mut self.pics[which];
        pic.poll = false;
        match pic.request(which == 0) {
            Some(line) => {
                pic.take(line);
                0x80 | line
            }
            None => 0,
        }
    }

    /// `OUT` to one of the ports.
    pub fn write(&mut self, port: u16, value: u8) {
        let slave = usize::from(port >> 7 & 1);
        match port {
            0x4d0 | 0x4d1 => {
                let pic = &mut self.pics[usize::from(port & 1)];
                pic.elcr = value & pic.elcr_mask;
            }
            _ if port & 1 == 0 => self.pics[slave].command(value),
            _ => self.pics[slave].data(value),
        }
        self.cascade();
    }

    /// Puts saved state in place.
    pub fn set_state(&mut self, pics: [Pic; 2]) {
        self.pics = pics;
        for pic in &mut self.pics {
            pic.priority_add &= 7;
            pic.init_state &= 3;
            pic.irq_base &= 0xf8;
            pic.elcr &= pic.elcr_mask;
        }
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both initialised as a PC's firmware does: vectors 08H and 70H, nothing masked.
    fn pair() -> PicPair {
        let mut pair = PicPair::default();
        for (port, base, wiring) in [(0x20, 0x08, 4), (0xa0, 0x70, 2)] {
            pair.write(port, 0x11);
            pair.write(port + 1, base);
            pair.write(port + 1, wiring);
            pair.write(port + 1, 0x01);
            pair.write(port + 1, 0);
        }
        pair
    }

    fn pulse(pair: &mut PicPair, irq: u8) {
        pair.set_irq(irq, true);
        pair.set_irq(irq, false);
    }

    #[test]
    fn an_edge_is_latched_and_served_once() {
        let mut pair = pair();
        pair.set_irq(4, true);
        assert!(pair.output());
        assert_eq!(pair.acknowledge(), 0x0c);
        assert!(!pair.output());
        pair.write(0x20, 0x20);
        // The line is still up: no new edge.
        assert!(!pair.output());
        pair.set_irq(4, false);
        pair.set_irq(4, true);
        assert!(pair.output());
    }

    #[test]
    fn nesting_goes_by_priority() {
        let mut pair = pair();
        pulse(&mut pair, 4);
        assert_eq!(pair.acknowledge(), 0x0c);
        pulse(&mut pair, 6);
        assert!(!pair.output(), "6 waits for 4");
        pulse(&mut pair, 1);
        assert_eq!(pair.acknowledge(), 0x09);
        pair.write(0x20, 0x0b);
        assert_eq!(pair.read(0x20), 0x12);
        pair.write(0x20, 0x20);
        assert_eq!(pair.read(0x20), 0x10, "a non-specific EOI ends the highest");
        pair.write(0x20, 0x64);
        assert_eq!(pair.read(0x20), 0);
        assert_eq!(pair.acknowledge(), 0x0e);
    }

    #[test]
    fn the_slave_comes_through_line_two() {
        let mut pair = pair();
        pulse(&mut pair, 8);
        pulse(&mut pair, 14);
        assert_eq!(pair.acknowledge(), 0x70);
        assert!(!pair.output());
        pair.write(0xa0, 0x20);
        // Without special fully nested mode, line 2 in service still holds the slave back.
        assert!(!pair.output());
        pair.write(0x20, 0x20);
        assert_eq!(pair.acknowledge(), 0x76);
    }

    #[test]
    fn special_fully_nested_lets_the_slave_nest() {
        let mut pair = pair();
        for (value, port) in [(0x11, 0x20), (0x08, 0x21), (4, 0x21), (0x11, 0x21)] {
            pair.write(port, value);
        }
        pulse(&mut pair, 12);
        assert_eq!(pair.acknowledge(), 0x74);
        pulse(&mut pair, 8);
        assert_eq!(pair.acknowledge(), 0x70);
    }

    #[test]
    fn requests_that_vanish_are_spurious() {
        let mut pair = pair();
        pair.write(0x4d0, 0x20);
        pair.set_irq(5, true);
        assert!(pair.output());
        pair.set_irq(5, false);
        assert_eq!(pair.acknowledge(), 0x0f);
        pair.write(0x20, 0x0b);
        assert_eq!(pair.read(0x20), 0, "nothing is in service");
    }

    #[test]
    fn a_level_line_asks_again_after_eoi() {
        let mut pair = pair();
        pair.write(0x4d1, 0x08);
        assert_eq!(pair.read(0x4d1), 0x08);
        pair.set_irq(11, true);
        assert_eq!(pair.acknowledge(), 0x73);
        assert!(!pair.output());
        pair.write(0xa0, 0x20);
        pair.write(0x20, 0x20);
        assert!(pair.output());
        // It goes away too late: the master has latched the slave's request.
        pair.set_irq(11, false);
        assert_eq!(pair.acknowledge(), 0x77, "IRQ 15 is the slave's spurious interrupt");
        pair.write(0xa0, 0x0b);
        assert_eq!(pair.read(0xa0), 0);
        pair.write(0x20, 0x20);
        assert!(!pair.output());
    }

    #[test]
    fn elcr_keeps_fixed_lines_edge_triggered() {
        let mut pair = pair();
        pair.write(0x4d0, 0xff);
        pair.write(0x4d1, 0xff);
        assert_eq!((pair.read(0x4d0), pair.read(0x4d1)), (0xf8, 0xde));
    }

    #[test]
    fn special_mask_lets_lower_ones_through() {
        let mut pair = pair();
        pulse(&mut pair, 3);
        assert_eq!(pair.acknowledge(), 0x0b);
        pulse(&mut pair, 6);
        assert!(!pair.output());
        pair.write(0x21, 0x08);
        pair.write(0x20, 0x68);
        assert_eq!(pair.acknowledge(), 0x0e);
    }

    #[test]
    fn rotation_moves_the_top() {
        let mut pair = pair();
        pulse(&mut pair, 3);
        assert_eq!(pair.acknowledge(), 0x0b);
        pair.write(0x20, 0xa0);
        pulse(&mut pair, 3);
        pulse(&mut pair, 5);
        assert_eq!(pair.acknowledge(), 0x0d, "3 is the lowest now");
        // Set priority: 4 the lowest, so 5 is the highest.
        pair.write(0x20, 0x65);
        pair.write(0x20, 0xc4);
        pulse(&mut pair, 5);
        assert_eq!(pair.acknowledge(), 0x0d);
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service() {
        let mut pair = pair();
        for (value, port) in [(0x11, 0x20), (0x08, 0x21), (4, 0x21), (0x03, 0x21)] {
            pair.write(port, value);
        }
        pulse(&mut pair, 1);
        assert_eq!(pair.acknowledge(), 0x09);
        pair.write(0x20, 0x0b);
        assert_eq!(pair.read(0x20), 0);
        pair.write(0x20, 0x80);
        pulse(&mut pair, 1);
        assert_eq!(pair.acknowledge(), 0x09);
        assert_eq!(pair.pics[0].priority_add, 2);
    }

    #[test]
    fn polling_acknowledges() {
        let mut pair = pair();
        pair.write(0x20, 0x0c);
        assert_eq!(pair.read(0x20), 0);
        pulse(&mut pair, 6);
        pair.write(0x20, 0x0c);
        assert_eq!(pair.read(0x20), 0x86);
        assert!(!pair.output());
        pair.write(0x20, 0x0b);
        assert_eq!(pair.read(0x20), 0x40);
    }

    #[test]
    fn masks_hold_but_do_not_lose() {
        let mut pair = pair();
        pair.write(0x21, 0xff);
        pulse(&mut pair, 4);
        assert!(!pair.output());
        assert_eq!(pair.read(0x20), 0x10);
        pair.write(0x21, 0xef);
        assert_eq!(pair.acknowledge(), 0x0c);
    }

    #[test]
    fn initialisation_clears_the_mask() {
        let mut pair = pair();
        pair.write(0x21, 0xaa);
        assert_eq!(pair.read(0x21), 0xaa);
        pair.write(0x20, 0x11);
        assert_eq!(pair.read(0x21), 0);
    }
}
