//! A machine's disks and cards: opened on the host, put on PCI in the order of the spec.

use std::sync::Arc;

use lodge_accel::Vm;
use lodge_devices::pci::{Root, Slot};
use lodge_devices::virtio::block::{Block, BlockConfig};
use lodge_devices::virtio::net::{Net as NetCard, NetConfig};
use lodge_devices::virtio::rng::Rng;
use lodge_devices::virtio::{VirtioDevice, VirtioPci};
use lodge_disk::Disk as DiskImage;
use lodge_memory::GuestMemory;
use lodge_model::net::Protocol;
use lodge_model::spec::{Disk, DiskFormat, MachineSpec, Net};
use lodge_net::Backend;

use crate::error::Error;

/// What the host gives to a machine: opened first, because most mistakes show here, before anything costs time.
pub struct Resources {
    disks: Vec<Arc<dyn DiskImage>>,
    nets: Vec<Box<dyn Backend>>,
}

impl Resources {
    /// Opens and locks the disks, opens the taps, starts the user-mode networks.
    ///
    /// # Errors
    /// Each names the file or interface and the way out.
    pub fn open(spec: &MachineSpec) -> Result<Self, Error> {
        let disks = spec.disks.iter().map(open_disk).collect::<Result<_, _>>()?;
        let nets = (0..spec.nets.len()).map(|i| open_net(spec, i)).collect::<Result<_, _>>()?;
        Ok(Self { disks, nets })
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

/// Puts `resources` on PCI, and a source of randomness, which every guest wants early.
///
/// # Errors
/// No slot or address window is left, or the host has no more descriptors.
pub fn plug_in(
    spec: &MachineSpec,
    resources: Resources,
    pci: &Root,
    memory: &Arc<GuestMemory>,
    vm: &Arc<dyn Vm>,
) -> Result<Vec<Arc<VirtioPci>>, Error> {
    let mut plugged = Vec::new();
    let mut plug = |device: Box<dyn VirtioDevice>| -> Result<(), Error> {
        let function = VirtioPci::new(device, memory.clone(), vm.clone())?;
        pci.add(Slot::FirstFree, function.clone())?;
        plugged.push(function);
        Ok(())
    };
    let queues = u16::try_from(spec.cpus).unwrap_or(u16::MAX);
    for (index, (disk, image)) in spec.disks.iter().zip(resources.disks).enumerate() {
        let serial = disk.serial.clone().unwrap_or_default();
        let config = BlockConfig { serial, queues };
        plug(Box::new(Block::new(&format!("disk{index}"), image, &config)))?;
    }
    for (index, backend) in resources.nets.into_iter().enumerate() {
        let config = NetConfig { mac: spec.mac_of(index).0, mtu: None };
        plug(Box::new(NetCard::new(&format!("net{index}"), vec![backend], config)?))?;
    }
    plug(Box::new(Rng::new("rng")))?;
    Ok(plugged)
}
