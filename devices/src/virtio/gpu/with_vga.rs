//! The screen of a display that is a VGA until its driver shows something.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::GpuHandle;
use crate::display::vga::Card;
use crate::display::{Picture, Screen, Update};

/// One screen of two: the GPU's while its driver shows something, else the VGA's.
pub struct VgaGpuScreen {
    gpu: GpuHandle,
    card: Arc<Card>,
    /// The last picture was the GPU's.
    gpu_shown: AtomicBool,
}

impl VgaGpuScreen {
    /// The screen of a function made by [`crate::virtio::VirtioPci::with_vga`].
    pub fn new(gpu: GpuHandle, card: Arc<Card>) -> Self {
        Self { gpu, card, gpu_shown: AtomicBool::new(false) }
    }
}

impl Screen for VgaGpuScreen {
    fn refresh(&self, picture: &mut Picture) -> Update {
        let active = self.gpu.active();
        let switched = self.gpu_shown.swap(active, Ordering::SeqCst) != active;
        if active {
            if switched {
                self.gpu.redraw();
            }
            return self.gpu.refresh(picture);
        }
        if switched {
            self.card.redraw();
        }
        let mut update = self.card.refresh(picture);
        if switched {
            update.cursor = Some(None);
        }
        update
    }

    fn suggest_size(&self, width: u32, height: u32) -> bool {
        self.gpu.suggest_size(width, height)
    }
}
