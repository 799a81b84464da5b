//! Raw disks, through both engines, as a device sees them.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};

use common::{ENGINES, Guest, options};
use lodge_disk::{Error, Format, Op, OpenOptions, open};

#[test]
fn what_was_written_is_read_and_is_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    for engine in ENGINES {
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let disk = open(&OpenOptions { engine, ..options(&path) }).unwrap();
        assert_eq!((disk.size(), disk.read_only(), disk.block_size()), (1 << 20, false, 512));
        let mut guest = Guest::new(&*disk);
        guest.write(4096, b"hello").unwrap();
        guest.flush().unwrap();
        assert_eq!(guest.read(4095, 7).unwrap(), b"\0hello\0");
        guest.write_zeroes(4097, 3, false).unwrap();
        assert_eq!(guest.read(4096, 5).unwrap(), b"h\0\0\0o");
        guest.write(8192, &[7; 16384]).unwrap();
        guest.discard(8192, 16384).unwrap();
        guest.write_zeroes(8192, 16384, true).unwrap();
        assert_eq!(guest.read(8192, 16384).unwrap(), [0; 16384]);
        drop((guest, disk));
        assert_eq!(&fs::read(&path).unwrap()[4095..4102], b"\0h\0\0\0o\0");
    }
}

#[test]
fn random_parallel_requests_leave_what_a_model_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    for engine in ENGINES {
        File::create(&path).unwrap().set_len(8 << 20).unwrap();
        let disk = open(&OpenOptions { engine, ..options(&path) }).unwrap();
        common::stress(&*disk, 3000, engine as u64 + 7);
        drop(disk);
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 20);
    }
}

#[test]
fn a_size_between_blocks_is_rounded_up_and_the_rest_is_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    fs::write(&path, [9; 1000]).unwrap();
    let disk = open(&options(&path)).unwrap();
    assert_eq!(disk.size(), 1024);
    let mut guest = Guest::new(&*disk);
    let tail = guest.read(512, 512).unwrap();
    assert_eq!((&tail[..488], &tail[488..]), (&[9; 488][..], &[0; 24][..]));
    guest.write(512, &[1; 512]).unwrap();
    assert_eq!(guest.read(512, 512).unwrap(), [1; 512]);
}

#[test]
fn a_request_that_leaves_the_disk_or_may_not_write_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    fs::write(&path, [3; 4096]).unwrap();
    let disk = open(&OpenOptions { read_only: true, ..options(&path) }).unwrap();
    let mut guest = Guest::new(&*disk);
    assert!(guest.read(4096, 1).is_err());
    assert!(guest.read(u64::MAX, 512).is_err());
    assert_eq!(guest.write(0, b"x").unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert!(guest.discard(0, 512).is_err());
    assert!(guest.run(Op::WriteZeroes { offset: 0, len: 1, unmap: true }).is_err());
    assert_eq!(guest.read(0, 4096).unwrap(), [3; 4096]);
    assert!(!disk.capabilities().discard);
    assert_eq!(fs::read(&path).unwrap(), [3; 4096]);
}

#[test]
fn a_full_host_fails_that_request_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let Some(full) = common::SmallFs::mount(dir.path(), 4 << 20) else { return };
        let path = full.path().join("a.img");
        File::create(&path).unwrap().set_len(64 << 20).unwrap();
        let disk = open(&OpenOptions { engine, ..options(&path) }).unwrap();
        let mut guest = Guest::new(&*disk);
        guest.write(0, &[1; 4096]).unwrap();
        let error = guest.write(1 << 20, &vec![2; 16 << 20]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        guest.write(0, &[3; 4096]).unwrap();
        guest.flush().unwrap();
        assert_eq!(guest.read(0, 4096).unwrap(), [3; 4096]);
        guest.discard(1 << 20, 16 << 20).unwrap();
        guest.write(32 << 20, &[4; 65536]).unwrap();
    }
}

#[test]
fn what_is_no_disk_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("thing");
    let message = |e: Error| format!("{e}");
    let failed = |o: &OpenOptions| message(open(o).err().expect("it must be refused"));
    assert!(failed(&options(&path)).contains("thing"));
    fs::create_dir(&path).unwrap();
    assert!(failed(&options(&path)).contains("thing is a directory"));
    fs::remove_dir(&path).unwrap();
    fs::write(&path, []).unwrap();
    assert!(failed(&options(&path)).contains("it is empty"));
    assert!(failed(&options("/dev/null".as_ref())).contains("a character device"));
    fs::write(&path, [0; 512]).unwrap();
    let _first = open(&options(&path)).unwrap();
    let text = failed(&options(&path));
    assert!(text.contains("thing is in use by this machine itself"), "{text}");
}

#[test]
fn a_file_that_may_not_be_written_is_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    fs::write(&path, [0; 512]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    // Root may write it all the same; as root a read-only mount shows the same thing.
    match open(&options(&path)) {
        Err(e) => assert!(format!("{e}").contains("give `readonly`"), "{e}"),
        Ok(_) => println!("SKIPPED: root may write everything"),
    }
    assert!(open(&OpenOptions { read_only: true, ..options(&path) }).is_ok());
}

#[test]
fn a_raw_image_is_never_taken_for_another_format_when_it_is_said_to_be_raw() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    let mut bytes = vec![0; 4096];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    fs::write(&path, &bytes).unwrap();
    assert!(open(&options(&path)).is_err(), "the magic says qcow2, and it is not one");
    let raw = OpenOptions { format: Some(Format::Raw), ..options(&path) };
    let disk = open(&raw).unwrap();
    assert_eq!(disk.size(), 4096);
    assert_eq!(Guest::new(&*disk).read(0, 4).unwrap(), b"QFI\xfb");
}

#[test]
fn a_queue_that_is_dropped_waits_for_its_requests() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    for engine in ENGINES {
        File::create(&path).unwrap().set_len(64 << 20).unwrap();
        let disk = open(&OpenOptions { engine, ..options(&path) }).unwrap();
        let mut data = vec![5u8; 16 << 20];
        let mut queue = disk.queue().unwrap();
        let buffers = common::buffers(&mut data, 65536);
        // SAFETY: `data` outlives the queue.
        unsafe {
            let op = Op::Write { offset: 0, buffers };
            queue.submit(lodge_disk::Request { id: 1, op }).unwrap();
        }
        drop(queue);
        data.fill(6);
        let mut seen = vec![0; 16 << 20];
        File::open(&path).unwrap().read_exact_at(&mut seen, 0).unwrap();
        assert!(seen.iter().all(|&b| b == 5));
    }
}
