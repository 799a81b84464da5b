//! Exceptions (Intel SDM volume 3, chapter 6).

/// Exception vectors.
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// Bits of a page fault's error code (SDM volume 3, 4.7).
pub mod pf {
    #![allow(missing_docs)]
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const USER: u32 = 4;
    pub const RESERVED: u32 = 8;
    pub const FETCH: u32 = 16;
}

/// An exception that the current instruction raised. The instruction has had no effect, but for the
/// elements of a string instruction that are done (RCX, RSI and RDI say which).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The vector.
    pub vector: u8,
    /// The error code, for the vectors that have one.
    pub error: Option<u32>,
}

impl Fault {
    /// An exception without an error code.
    pub const fn new(vector: u8) -> Self {
        Self { vector, error: None }
    }
    /// An exception with an error code.
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error) }
    }
    /// #UD.
    pub const UD: Self = Self::new(vector::UD);
    /// #NM.
    pub const NM: Self = Self::new(vector::NM);
    /// #DE.
    pub const DE: Self = Self::new(vector::DE);
    /// #GP(0).
    pub const GP0: Self = Self::with_error(vector::GP, 0);
    /// #SS(0).
    pub const SS0: Self = Self::with_error(vector::SS, 0);
    /// #GP(selector): the error code of a selector is its index and TI, bits 15:2.
    pub const fn gp(selector: u16) -> Self {
        Self::with_error(vector::GP, selector as u32 & 0xfffc)
    }
    /// #NP(selector).
    pub const fn np(selector: u16) -> Self {
        Self::with_error(vector::NP, selector as u32 & 0xfffc)
    }
    /// #SS(selector).
    pub const fn ss(selector: u16) -> Self {
        Self::with_error(vector::SS, selector as u32 & 0xfffc)
    }
    /// #TS(selector).
    pub const fn ts(selector: u16) -> Self {
        Self::with_error(vector::TS, selector as u32 & 0xfffc)
    }
}

/// What executing comes to.
pub type Exec<T = ()> = Result<T, Fault>;
