//! Pools that cannot be made, and devices that are not the pool's.

#![allow(missing_docs)]

mod sim;

use base::{ClusterId, PoolId, ServerId};
use core::time::Duration;
use sim::{Disk, Random, SECTOR, World, config, format_config, shape};
use store::{DeviceIndex, FormatError, LABEL_AREA_BYTES, LabelError, OpenError, format, identify};

fn error(result: Result<(), OpenError>) -> LabelError {
    match result {
        Err(OpenError::Label { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn wrong_devices_are_told_apart() {
    let shape = shape();
    let good = World::new(shape.clone(), Random::new(1)).disks;
    let label = |disk: &Disk| identify(&disk.media[..LABEL_AREA_BYTES]);
    assert_eq!(label(&good[1]).expect("a label").device, DeviceIndex(1));
    assert_eq!(identify(&[0; 10]), Err(LabelError::TooShort));
    assert_eq!(identify(&vec![0; LABEL_AREA_BYTES]), Err(LabelError::Blank));
    assert_eq!(identify(&vec![7; LABEL_AREA_BYTES]), Err(LabelError::Foreign));

    let open = |change: &dyn Fn(&mut World)| {
        let mut world = World::new(shape.clone(), Random::new(1));
        world.run(Duration::from_secs(1));
        change(&mut world);
        world.reopen(false)
    };
    assert!(open(&|_| ()).is_ok());
    // One copy of a label is enough.
    assert!(open(&|world| world.disks[0].media[..4096].fill(0xff)).is_ok());
    assert!(open(&|world| world.disks[0].media[65536..65536 + 4096].fill(0xff)).is_ok());
    // Nor need the sectors of the other be readable, or what lies between them.
    for sectors in [vec![0], vec![65536 / SECTOR], vec![9, 17], vec![65536 / SECTOR + 20]] {
        let opened = open(&|world| world.disks[1].latent.extend(&sectors));
        assert!(opened.is_ok(), "sectors {sectors:?}: {opened:?}");
    }
    for other in [65536 / SECTOR, 65536 / SECTOR + 9] {
        let unreadable = open(&|world| world.disks[0].latent.extend([3, other]));
        assert!(matches!(unreadable, Err(OpenError::Read { device: DeviceIndex(0), .. })));
    }
    // What can be read is believed only if it is a label.
    let mixed = open(&|world| {
        world.disks[0].media[100] ^= 1;
        world.disks[0].latent.insert(65536 / SECTOR);
    });
    assert!(matches!(mixed, Err(OpenError::Read { .. })));
    let swapped = open(&|world| world.disks[0].media[..131_072].fill(0xff));
    assert_eq!(error(swapped), LabelError::Foreign);
    let blank = open(&|world| world.disks[1].media.fill(0));
    assert_eq!(error(blank), LabelError::Blank);
    let damaged = open(&|world| {
        world.disks[1].media[80] ^= 1;
        world.disks[1].media[65536 + 80] ^= 1;
    });
    assert_eq!(error(damaged), LabelError::Damaged);
    for (found, expected) in
        [(3, LabelError::Newer { found: 3 }), (1, LabelError::Older { found: 1 })]
    {
        let other = open(&|world| {
            for at in [0, 65536] {
                let page = &mut world.disks[1].media[at..at + 4096];
                page[8] = found;
                let crc = base::checksum::crc32c_without(page, 12);
                page[12..16].copy_from_slice(&crc.to_le_bytes());
            }
        });
        assert_eq!(error(other), expected);
    }
    let order = open(&|world| {
        world.disks.swap(0, 1);
        world.shape.devices.swap(0, 1);
    });
    assert_eq!(error(order), LabelError::WrongDevice { found: DeviceIndex(1) });
    let shrunk = open(&|world| world.shape.devices[1].bytes -= 4096);
    assert!(matches!(error(shrunk), LabelError::Shrunk { .. }));
    let count = open(&|world| {
        world.disks.pop();
        world.shape.devices.pop();
    });
    assert_eq!(error(count), LabelError::WrongDeviceCount { found: 2, expected: 1 });
}

#[test]
fn a_pool_of_others_is_refused_and_not_touched() {
    let shape = shape();
    let world = World::new(shape.clone(), Random::new(1));
    for (config, expected) in [
        (store::StoreConfig { pool: Some(PoolId::from_bytes([8; 16])), ..config(&shape) }, "pool"),
        (
            store::StoreConfig { cluster: ClusterId::from_bytes([8; 16]), ..config(&shape) },
            "cluster",
        ),
        (store::StoreConfig { server: ServerId::from_bytes([8; 16]), ..config(&shape) }, "server"),
    ] {
        let mut disks = world.disks.clone();
        let mut store = store::Store::open(config, &shape.devices);
        let result = loop {
            match store.poll_output().expect("an opening ends") {
                store::Output::Opened(result) => break result,
                store::Output::Disk(operation) => {
                    let store::DiskKind::Read { offset, mut buffer, length, .. } = operation.kind
                    else {
                        panic!("nothing is written to a foreign pool")
                    };
                    let disk = &mut disks[usize::from(operation.device.0)];
                    disk.read(offset, &mut buffer.payload_mut()[..length]).expect("it reads");
                    let result = store::DiskResult::Read(Ok(buffer));
                    let done = store::Input::DiskDone { id: operation.id, result };
                    store.handle(base::Instant::ZERO, done);
                }
                other => panic!("{other:?}"),
            }
        };
        let error = error(result);
        let fits = match error {
            LabelError::WrongPool { .. } => expected == "pool",
            LabelError::WrongCluster { .. } => expected == "cluster",
            LabelError::WrongServer { .. } => expected == "server",
            _ => false,
        };
        assert!(fits, "{error}");
    }
}

#[test]
fn impossible_pools_are_refused() {
    let base = format_config(&shape());
    let with = |change: &dyn Fn(&mut store::FormatConfig)| {
        let mut config = base.clone();
        change(&mut config);
        format(&config).err()
    };
    assert_eq!(with(&|_| ()), None);
    assert_eq!(with(&|config| config.devices.clear()), Some(FormatError::Devices));
    assert_eq!(
        with(&|config| {
            config.devices.remove(0);
        }),
        Some(FormatError::Devices)
    );
    assert!(matches!(
        with(&|config| config.devices[0].bytes = 1 << 20),
        Some(FormatError::TooSmall { .. })
    ));
    assert_eq!(
        with(&|config| {
            config.devices.pop();
        }),
        Some(FormatError::NoHome)
    );
    for change in [
        (&|config: &mut store::FormatConfig| config.chunk_bytes = 100_000)
            as &dyn Fn(&mut store::FormatConfig),
        &|config| config.segment_bytes = 4096,
        &|config| config.segment_bytes = (1 << 20) + 1,
        &|config| config.replicas_max = 100_000,
    ] {
        assert!(matches!(with(change), Some(FormatError::Value { .. })));
    }
    // A file per role, or one file with both: the writes stay within the devices.
    for write in format(&base).expect("it works") {
        let device = base.devices[usize::from(write.device.0)];
        assert!(write.offset + write.bytes.len() as u64 <= device.bytes);
        assert!(write.bytes.len() % 4096 == 0 && write.offset % 4096 == 0);
    }
}
