//! A machine's disks and cards: opened on the host, put on PCI in the order of the spec.

use std::path::Path;
use std::sync::Arc;

use lodge_accel::Vm;
use lodge_devices::ahci::{self, Ahci, AtaDisk, AtaDiskConfig, Drive};
use lodge_devices::device_ram::{Access, DeviceRam, slots};
use lodge_devices::display::Screen;
use lodge_devices::display::vga::{Card, CardConfig, Vga};
use lodge_devices::input::InputDevice;
use lodge_devices::pci::{Bdf, Root, Slot};
use lodge_devices::storage::{CdRom, CdRomConfig, ScsiDisk, ScsiDiskConfig};
use lodge_devices::virtio::block::{Block, BlockConfig};
use lodge_devices::virtio::gpu::{Gpu, VgaGpuScreen};
use lodge_devices::virtio::input::{Input, InputKind};
use lodge_devices::virtio::net::{Net as NetCard, NetConfig};
use lodge_devices::virtio::rng::Rng;
use lodge_devices::virtio::scsi::{Scsi, ScsiHandle, ScsiUnit};
use lodge_devices::virtio::{VirtioDevice, VirtioPci};
use lodge_disk::Disk as DiskImage;
use lodge_memory::GuestMemory;
use lodge_model::net::Protocol;
use lodge_model::spec::{Boot, BootDevice, Disk, DiskBus, DiskFormat, MachineSpec, Net, Video};
use lodge_net::Backend;

use crate::error::Error;
use crate::firmware;

/// What the host gives to a machine: opened first, because most mistakes show here, before anything costs time.
pub struct Resources {
    disks: Vec<Arc<dyn DiskImage>>,
    /// What is in the CD-ROM drives.
    media: Vec<Option<Arc<dyn DiskImage>>>,
    nets: Vec<Box<dyn Backend>>,
}

impl Resources {
    /// Opens and locks the disks, opens the taps, starts the user-mode networks.
    ///
    /// # Errors
    /// Each names the file or interface and the way out.
    pub fn open(spec: &MachineSpec) -> Result<Self, Error> {
        let disks = spec.disks.iter().map(open_disk).collect::<Result<_, _>>()?;
        let media =
            spec.cdroms.iter().map(|drive| drive.path.as_deref().map(open_medium).transpose());
        let media = media.collect::<Result<_, _>>()?;
        let nets = (0..spec.nets.len()).map(|i| open_net(spec, i)).collect::<Result<_, _>>()?;
        Ok(Self { disks, media, nets })
    }
}

fn open_disk(disk: &Disk) -> Result<Arc<dyn DiskImage>, Error> {
    let mut options = lodge_disk::OpenOptions::new(&disk.path);
    options.read_only = disk.readonly;
    options.format = disk.format.map(|format| match format {
        DiskFormat::Raw => lodge_disk::Format::Raw,
        DiskFormat::Qcow2 => lodge_disk::Format::Qcow2,
    });
    Ok(lodge_disk::open(&options)?)
}

/// Opens what goes into a CD-ROM drive: an ISO image, whatever it looks like.
fn open_medium(path: &Path) -> Result<Arc<dyn DiskImage>, Error> {
    let mut options = lodge_disk::OpenOptions::new(path);
    options.read_only = true;
    options.format = Some(lodge_disk::Format::Raw);
    Ok(lodge_disk::open(&options)?)
}

fn open_net(spec: &MachineSpec, index: usize) -> Result<Box<dyn Backend>, Error> {
    Ok(match &spec.nets[index] {
        Net::Tap(tap) => {
            let queues = lodge_net::Tap::open(&tap.name, 1)?;
            // One queue was asked for.
            queues
                .into_iter()
                .map(|tap| Box::new(tap) as Box<dyn Backend>)
                .next()
                .ok_or(Error::Invalid(format!("the tap {} gave no queue", tap.name)))?
        }
        Net::User(user) => {
            let forwards = user
                .forward
                .iter()
                .map(|forward| lodge_net::Forward {
                    protocol: match forward.protocol {
                        Protocol::Tcp => lodge_net::Protocol::Tcp,
                        Protocol::Udp => lodge_net::Protocol::Udp,
                    },
                    address: forward.address,
                    host: forward.host,
                    guest: forward.guest,
                })
                .collect();
            let mac = spec.mac_of(index).0;
            Box::new(lodge_net::User::open(&lodge_net::UserOptions { mac, forwards })?)
        }
    })
}

/// What is on PCI beside the chipset.
pub struct Peripherals {
    virtio: Vec<Arc<VirtioPci>>,
    ahci: Option<Arc<Ahci>>,
    /// Pointers and keyboards beside those on the board.
    input: Vec<Arc<dyn InputDevice>>,
    /// Where the firmware finds the disks, the drives and the cards, in the spec's order: device paths.
    disks: Vec<String>,
    cdroms: Vec<String>,
    nets: Vec<String>,
    screen: Option<Arc<dyn Screen>>,
}

impl Peripherals {
    /// The display's picture, if there is a display.
    pub fn screen(&self) -> Option<Arc<dyn Screen>> {
        self.screen.clone()
    }

    /// Pointers and keyboards, the preferred ones first.
    pub fn input(&self) -> Vec<Arc<dyn InputDevice>> {
        self.input.clone()
    }

    /// Devices stand still: requests under way are finished, no new ones are begun.
    pub fn pause(&self) {
        self.virtio.iter().for_each(|device| device.pause());
        self.ahci.iter().for_each(|controller| controller.pause());
    }

    /// And go on.
    pub fn resume(&self) {
        self.virtio.iter().for_each(|device| device.resume());
        self.ahci.iter().for_each(|controller| controller.resume());
    }

    /// What the firmware boots from, best first, as Open Firmware device paths (IEEE 1275; the form that SeaBIOS and OVMF
    /// read). `first` is the machine's first start.
    pub fn boot_order(&self, boot: &Boot, first: bool) -> Vec<String> {
        let once = boot.once.iter().filter(|_| first);
        let mut paths = Vec::new();
        for kind in once.chain(&boot.order) {
            let found = match kind {
                BootDevice::Disk => &self.disks,
                BootDevice::Cdrom => &self.cdroms,
                BootDevice::Network => &self.nets,
            };
            for path in found {
                if !paths.contains(path) {
                    paths.push(path.clone());
                }
            }
        }
        paths
    }
}

/// The machine's SCSI controller, which is filled target by target.
struct ScsiBus {
    handle: ScsiHandle,
    at: Bdf,
    targets: u8,
}

impl ScsiBus {
    /// Adds a unit; gives its device path.
    fn plug(&mut self, unit: ScsiUnit) -> Result<String, Error> {
        let target = self.targets;
        self.handle.plug(target, 0, unit).map_err(|_| {
            Error::Invalid("the SCSI controller has no target left: use fewer disks".into())
        })?;
        self.targets = target.saturating_add(1);
        Ok(format!("{}/channel@0/disk@{target:x},0", node("scsi", self.at)))
    }
}

/// The chipset's SATA controller, which is there when something is connected to it.
struct SataBus<'a> {
    memory: &'a Arc<GuestMemory>,
    vm: &'a Arc<dyn Vm>,
    pci: &'a Root,
    controller: Option<Arc<Ahci>>,
    ports: usize,
}

impl SataBus<'_> {
    /// Connects a drive to the next port; gives its device path.
    fn plug(&mut self, drive: Drive) -> Result<String, Error> {
        let controller = match &self.controller {
            Some(controller) => controller.clone(),
            None => {
                let controller = Ahci::new("sata", self.memory.clone(), self.vm.clone())?;
                self.pci.add(Slot::At(ahci::PLACE), controller.clone())?;
                self.controller.insert(controller).clone()
            }
        };
        let port = self.ports;
        controller.plug(port, drive)?;
        self.ports += 1;
        Ok(format!("{}/drive@{port:x}/disk@0", node("pci8086,2922", ahci::PLACE)))
    }
}

/// A PCI function on the root bus in an Open Firmware device path.
fn node(name: &str, at: Bdf) -> String {
    let function = if at.function == 0 { String::new() } else { format!(",{:x}", at.function) };
    format!("/pci@i0cf8/{name}@{:x}{function}", at.device)
}

/// Bytes of a frame buffer: room for 2560x1600 in 32 bits.
const FRAME_BUFFER: u64 = 16 << 20;

/// Puts `resources` on PCI, a display if the spec has one, and a source of randomness, which every guest wants early.
///
/// # Errors
/// No slot or address window is left, the host has no more descriptors, or the display's BIOS is missing.
pub fn plug_in(
    spec: &MachineSpec,
    resources: Resources,
    pci: &Root,
    memory: &Arc<GuestMemory>,
    vm: &Arc<dyn Vm>,
) -> Result<Peripherals, Error> {
    let mut displays = Vec::new();
    let mut virtio = Vec::new();
    let mut plug = |device: Box<dyn VirtioDevice>| -> Result<Bdf, Error> {
        let function = VirtioPci::new(device, memory.clone(), vm.clone())?;
        let at = pci.add(Slot::FirstFree, function.clone())?;
        virtio.push(function);
        Ok(at)
    };
    let screen = match spec.video_kind() {
        Video::None => None,
        Video::Vga => Some(plug_vga(pci, vm)?),
        Video::Virtio => {
            let (function, screen) = virtio_vga(memory, vm)?;
            pci.add(Slot::FirstFree, function.clone())?;
            displays.push(function);
            Some(screen)
        }
    };
    let queues = u16::try_from(spec.cpus).unwrap_or(u16::MAX);
    let mut scsi = None;
    let disks_on = |wanted| spec.disks.iter().any(|disk| disk.bus == Some(wanted));
    if disks_on(DiskBus::Scsi) || spec.cdroms.iter().any(|drive| drive.bus != Some(DiskBus::Sata)) {
        let controller = Scsi::new("scsi", queues)?;
        let handle = controller.handle();
        let at = plug(Box::new(controller))?;
        scsi = Some(ScsiBus { handle, at, targets: 0 });
    }
    let mut sata = SataBus { memory, vm, pci, controller: None, ports: 0 };
    let mut disks = Vec::new();
    for (index, (disk, image)) in spec.disks.iter().zip(resources.disks).enumerate() {
        let serial = disk.serial.clone().unwrap_or_default();
        disks.push(match (disk.bus, &mut scsi) {
            (Some(DiskBus::Scsi), Some(bus)) => {
                let config = ScsiDiskConfig { serial, ..ScsiDiskConfig::default() };
                bus.plug(ScsiUnit::Disk(ScsiDisk::new(image, &config)))?
            }
            (Some(DiskBus::Sata), _) => {
                sata.plug(Drive::Disk(AtaDisk::new(image, &AtaDiskConfig { serial })))?
            }
            _ => {
                let config = BlockConfig { serial, queues };
                let at = plug(Box::new(Block::new(&format!("disk{index}"), image, &config)))?;
                format!("{}/disk@0,0", node("scsi", at))
            }
        });
    }
    let mut cdroms = Vec::new();
    for (index, (drive, medium)) in spec.cdroms.iter().zip(resources.media).enumerate() {
        let config = CdRomConfig { serial: format!("cdrom{index}") };
        let unit = CdRom::new(&config, medium);
        cdroms.push(match (drive.bus, &mut scsi) {
            (None | Some(DiskBus::Scsi), Some(bus)) => bus.plug(ScsiUnit::CdRom(unit))?,
            _ => sata.plug(Drive::CdRom(unit))?,
        });
    }
    let mut nets = Vec::new();
    for (index, backend) in resources.nets.into_iter().enumerate() {
        let config = NetConfig { mac: spec.mac_of(index).0, mtu: None };
        let at = plug(Box::new(NetCard::new(&format!("net{index}"), vec![backend], config)?))?;
        nets.push(format!("{}/ethernet-phy@0", node("ethernet", at)));
    }
    plug(Box::new(Rng::new("rng")))?;
    let mut input: Vec<Arc<dyn InputDevice>> = Vec::new();
    if screen.is_some() {
        let tablet = Input::new("tablet", InputKind::Tablet, "tablet0")?;
        input.push(Arc::new(tablet.handle()));
        plug(Box::new(tablet))?;
    }
    virtio.extend(displays);
    let ahci = sata.controller;
    Ok(Peripherals { virtio, ahci, input, disks, cdroms, nets, screen })
}

/// The memory of a display and the BIOS that a BIOS shows it with.
fn display_parts(kind: Video, vm: &Arc<dyn Vm>) -> Result<(Arc<DeviceRam>, Vec<u8>), Error> {
    let memory = DeviceRam::new(vm.clone(), slots::VIDEO, FRAME_BUFFER, Access::ReadWrite)?;
    Ok((memory, firmware::display_rom(kind)?))
}

fn plug_vga(pci: &Root, vm: &Arc<dyn Vm>) -> Result<Arc<dyn Screen>, Error> {
    let (memory, rom) = display_parts(Video::Vga, vm)?;
    let vga = Vga::new(memory, rom, &CardConfig::default())?;
    pci.add(Slot::FirstFree, vga.clone())?;
    Ok(vga.card().clone())
}

/// A VGA until the guest's driver for the GPU beside it shows something.
fn virtio_vga(
    memory: &Arc<GuestMemory>,
    vm: &Arc<dyn Vm>,
) -> Result<(Arc<VirtioPci>, Arc<dyn Screen>), Error> {
    let (frame_buffer, rom) = display_parts(Video::Virtio, vm)?;
    let config = CardConfig::default();
    let card = Card::new(frame_buffer, &config);
    let gpu = Gpu::new("gpu", config.preferred);
    let screen = Arc::new(VgaGpuScreen::new(gpu.handle(), card.clone()));
    let function = VirtioPci::with_vga(Box::new(gpu), memory.clone(), vm.clone(), card, rom)?;
    Ok((function, screen))
}
