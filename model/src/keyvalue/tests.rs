use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::net::{MacAddr, PortForward};
use crate::spec::{Accel, Console, Disk, DiskBus, DiskFormat, Net, TapNet, UserNet};

fn disk(text: &str) -> Result<Disk, String> {
    from_str(text).map_err(|error: Error| error.to_string())
}

fn net(text: &str) -> Result<Net, String> {
    from_str(text).map_err(|error: Error| error.to_string())
}

fn path(path: &str) -> Disk {
    Disk { path: path.into(), ..Disk::default() }
}

#[test]
fn disks() {
    assert_eq!(disk("a.img"), Ok(path("a.img")));
    assert_eq!(disk("path=a.img"), Ok(path("a.img")));
    let full = Disk {
        path: "/x y/a.img".into(),
        format: Some(DiskFormat::Qcow2),
        readonly: true,
        serial: Some("S-1".into()),
        bus: Some(DiskBus::Sata),
    };
    assert_eq!(disk("/x y/a.img,format=qcow2,readonly,serial=S-1,bus=sata"), Ok(full.clone()));
    assert_eq!(disk("bus=sata,serial=S-1,readonly=on,path=/x y/a.img,format=qcow2"), Ok(full));
    assert_eq!(disk("a,readonly=false"), Ok(path("a")));
}

#[test]
fn quotes_hide_commas() {
    assert_eq!(disk(r#""a,b=\"c\\",readonly=off"#), Ok(path(r#"a,b="c\"#)));
    assert_eq!(disk(r#"path="a,b""#), Ok(path("a,b")));
    assert_eq!(disk(r#"path=a=b"#), Ok(path("a=b")));
    assert_eq!(disk(r#""C:\x""#), Ok(path(r"C:\x")));
    assert!(disk(r#""a,b"#).unwrap_err().contains("does not end"));
    assert!(disk(r#""a"b"#).unwrap_err().contains("expected ','"));
}

#[test]
fn cards() {
    assert_eq!(net("user"), Ok(Net::User(UserNet::default())));
    let forward = vec![PortForward::tcp(2222, 22), "53:53/udp".parse().unwrap()];
    let text = "user,forward=2222:22,forward=53:53/udp";
    assert_eq!(net(text), Ok(Net::User(UserNet { forward, mac: None })));
    let mac = Some(MacAddr([2, 0, 0, 0, 0, 1]));
    let tap = Net::Tap(TapNet { name: "tap0".into(), mac });
    assert_eq!(net("tap=tap0,mac=02:00:00:00:00:01"), Ok(tap.clone()));
    assert_eq!(net("tap,name=tap0,mac=02:00:00:00:00:01"), Ok(tap));
}

#[test]
fn consoles_and_plain_values() {
    assert_eq!(from_str("stdio"), Ok(Console::Stdio));
    assert_eq!(from_str("none"), Ok(Console::None));
    assert_eq!(from_str("file=/tmp/a=b"), Ok(Console::File("/tmp/a=b".into())));
    assert_eq!(from_str("file=\"/tmp/a,b\""), Ok(Console::File("/tmp/a,b".into())));
    assert_eq!(from_str("kvm"), Ok(Accel::Kvm));
    assert_eq!(from_str("0x10"), Ok(16u8));
    assert_eq!(from_str::<PathBuf>("a b"), Ok("a b".into()));
    assert_eq!(from_str::<Option<u16>>("7"), Ok(Some(7)));
}

#[test]
fn errors_say_which_word_and_what_it_could_be() {
    for (text, message) in [
        (
            "a,formats=raw",
            "unknown key 'formats', did you mean 'format'? Known: path, format, readonly, serial, bus",
        ),
        ("a,cache=none", "unknown key 'cache'. Known: path, format, readonly, serial, bus"),
        ("a,format=rwa", "format: unknown value 'rwa'. Known: raw, qcow2"),
        ("readonly", "'path' is missing: add path=..."),
        ("a,readonly=maybe", "readonly: 'maybe' is neither true nor false"),
        ("a,serial", "serial: a value is missing: add '=' and the value"),
        ("a,serial=1,serial=2", "serial: is given twice"),
        ("a,path=b", "path: is given twice"),
        ("a,,readonly", "there is an empty item: remove the comma too many"),
        ("a,\"b\"", "\"b\" stands where a key is expected"),
    ] {
        assert_eq!(disk(text), Err(message.to_owned()), "{text}");
    }
    for (text, message) in [
        ("usr", "unknown value 'usr', did you mean 'user'? Known: user, tap"),
        ("tap", "tap: 'name' is missing: add name=..."),
        (
            "tap=t,mac=1",
            "tap: mac: '1' is not a MAC address: write six bytes in hexadecimal, as in 52:54:00:12:34:56",
        ),
        (
            "user,forward=22",
            "user: forward: '22' is not a port forward: write [ADDRESS:]HOSTPORT:GUESTPORT[/udp], as in 2222:22",
        ),
        ("user,ip=1", "user: unknown key 'ip'. Known: forward, mac"),
        (
            "user=x,mac=1",
            "user: forward: 'x' is not a port forward: write [ADDRESS:]HOSTPORT:GUESTPORT[/udp], as in 2222:22",
        ),
    ] {
        assert_eq!(net(text), Err(message.to_owned()), "{text}");
    }
    let console = |text| from_str::<Console>(text).unwrap_err().to_string();
    assert_eq!(console("stdio=x"), "'stdio' takes nothing more, not 'x'");
    assert_eq!(console("file"), "file: a value is missing");
    assert_eq!(
        console("file=a,b"),
        "file: 'b' is too much here; to have a comma in a value, quote it: \"a,b\""
    );
    assert_eq!(from_str::<u8>("300").unwrap_err().to_string(), "300 is out of range: use 0 to 255");
    assert_eq!(from_str::<u8>("x").unwrap_err().to_string(), "'x' is not a whole number");
}

#[test]
fn other_shapes_that_a_struct_may_have() {
    #[derive(Deserialize, PartialEq, Debug)]
    #[serde(deny_unknown_fields)]
    struct Shape {
        n: i32,
        #[serde(default)]
        f: Option<f64>,
        #[serde(default)]
        list: Vec<u8>,
        #[serde(default)]
        kind: Option<Kind>,
    }
    #[derive(Deserialize, PartialEq, Debug)]
    enum Kind {
        A,
        B { x: u8 },
    }
    let shape: Shape = from_str("-5,f=1.5,list=1,list=2,kind=A").unwrap();
    assert_eq!(shape, Shape { n: -5, f: Some(1.5), list: vec![1, 2], kind: Some(Kind::A) });
    assert_eq!(from_str::<Kind>("B,x=3"), Ok(Kind::B { x: 3 }));
    assert_eq!(from_str::<Kind>("B=3"), Ok(Kind::B { x: 3 }));
    assert!(from_str::<Shape>("1,kind=B").is_err());
}

#[test]
fn distances() {
    assert_eq!(distance("", "abc"), 3);
    assert_eq!(distance("formats", "format"), 1);
    assert_eq!(distance("kitten", "sitting"), 3);
}

proptest! {
    #[test]
    fn no_text_panics(text in "[a-z=,\"\\\\:0-9]{0,40}") {
        let _ = from_str::<Disk>(&text);
        let _ = from_str::<Net>(&text);
        let _ = from_str::<Console>(&text);
        let _ = from_str::<u64>(&text);
    }

    #[test]
    fn any_path_can_be_quoted(name in "[^\0]{1,30}") {
        let quoted = format!("\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""));
        prop_assert_eq!(disk(&quoted), Ok(path(&name)));
    }
}
