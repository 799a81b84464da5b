//! A server with a screen that tests draw on, and ways to connect to it.

use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lodge_devices::display::{Cursor, Picture, Rect, Screen, Update};
use lodge_devices::input::InputEvent;
use lodge_vmm::display::Display;
use lodge_vmm::vnc::{InputSink, Listen, VncOptions, VncServer};

use super::client::{Client, Stream};

/// A screen that shows what tests draw.
#[derive(Default)]
pub struct Canvas(Mutex<Drawn>);

#[derive(Default)]
struct Drawn {
    picture: Picture,
    update: Update,
    wished: Vec<(u32, u32)>,
}

impl Canvas {
    pub fn show(&self, picture: &Picture) {
        let mut drawn = self.0.lock().unwrap();
        let resized =
            (drawn.picture.width, drawn.picture.height) != (picture.width, picture.height);
        drawn.update.resized |= resized;
        drawn.update.dirty = picture.whole().into_iter().collect();
        drawn.picture.clone_from(picture);
    }

    /// Draws one rectangle.
    pub fn fill(&self, rect: Rect, colour: u32) {
        let mut drawn = self.0.lock().unwrap();
        let width = drawn.picture.width;
        for y in rect.y..rect.y + rect.height {
            let at = (y * width + rect.x) as usize;
            drawn.picture.pixels[at..at + rect.width as usize].fill(colour);
        }
        drawn.update.dirty.push(rect);
    }

    pub fn point(&self, cursor: Option<Cursor>) {
        self.0.lock().unwrap().update.cursor = Some(cursor.map(Arc::new));
    }

    pub fn wished(&self) -> Vec<(u32, u32)> {
        self.0.lock().unwrap().wished.clone()
    }
}

impl Screen for Canvas {
    fn refresh(&self, picture: &mut Picture) -> Update {
        let mut drawn = self.0.lock().unwrap();
        picture.clone_from(&drawn.picture);
        std::mem::take(&mut drawn.update)
    }

    /// Becomes black in the size that was wished for, if it is not too large.
    fn suggest_size(&self, width: u32, height: u32) -> bool {
        self.0.lock().unwrap().wished.push((width, height));
        let good = width <= 2000 && height <= 2000;
        if good {
            self.show(&Picture::black(width, height));
        }
        good
    }
}

/// Remembers what it was told.
#[derive(Default)]
pub struct Sink {
    events: Mutex<Vec<InputEvent>>,
    only_moves: std::sync::atomic::AtomicBool,
}

impl Sink {
    pub fn set_only_moves(&self) {
        self.only_moves.store(true, std::sync::atomic::Ordering::SeqCst);
    }

    /// Waits until this was told, then forgets it.
    pub fn expect(&self, events: &[InputEvent]) {
        let mut patience = PATIENCE.as_millis() / 5;
        loop {
            let mut told = self.events.lock().unwrap();
            if told.len() >= events.len() {
                assert_eq!(std::mem::take(&mut *told), events);
                return;
            }
            patience = patience.checked_sub(1).unwrap_or_else(|| panic!("only {told:?}"));
            drop(told);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl InputSink for Sink {
    fn send(&self, events: &[InputEvent]) {
        self.events.lock().unwrap().extend(events);
    }

    fn takes_places(&self) -> bool {
        !self.only_moves.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Host {
    pub canvas: Arc<Canvas>,
    pub sink: Arc<Sink>,
    pub display: Arc<Display>,
    pub server: VncServer,
}

pub fn options() -> VncOptions {
    let listen = Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)));
    VncOptions { listen, password: None, tls: None, name: "test".into() }
}

impl Host {
    pub fn new(picture: &Picture) -> Self {
        Self::with(&options(), picture)
    }

    pub fn with(options: &VncOptions, picture: &Picture) -> Self {
        let canvas = Arc::new(Canvas::default());
        canvas.show(picture);
        let sink = Arc::new(Sink::default());
        let display = Arc::new(Display::start(canvas.clone()).unwrap());
        let server = VncServer::start(options, display.clone(), sink.clone()).unwrap();
        Self { canvas, sink, display, server }
    }

    pub fn address(&self) -> SocketAddr {
        match self.server.local_addr() {
            Listen::Tcp(address) => *address,
            other => panic!("{other}"),
        }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// A client without a password, that knows these encodings.
    pub fn client(&self, encodings: &[i32]) -> Client {
        let mut client = Client::start(secured(self.connect()), true);
        client.set_encodings(encodings);
        client
    }

    /// Waits until so many clients are there.
    pub fn wait_for_clients(&self, count: usize) {
        let mut patience = PATIENCE.as_millis() / 5;
        while self.server.clients() != count {
            patience = patience.checked_sub(1).unwrap_or_else(|| {
                panic!("{} clients, not {count}", self.server.clients());
            });
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Version 3.8 without security.
pub fn secured(stream: impl Stream + 'static) -> Box<dyn Stream> {
    let mut stream: Box<dyn Stream> = Box::new(stream);
    assert_eq!(read::<12>(&mut stream), *b"RFB 003.008\n");
    stream.write_all(b"RFB 003.008\n").unwrap();
    assert_eq!(read::<2>(&mut stream), [1, 1]);
    stream.write_all(&[1]).unwrap();
    assert_eq!(read::<4>(&mut stream), [0; 4]);
    stream
}

pub fn read<const N: usize>(stream: &mut dyn Stream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// The rest of what the server says, until it ends the connection.
pub fn read_all(stream: &mut dyn Stream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Whether it ends well or by a reset depends on what was in flight.
    let _ = stream.read_to_end(&mut bytes);
    bytes
}
