//! The display thread: the one owner of the guest's [`Picture`], which it pulls from the guest's [`Screen`] while
//! somebody looks.
//!
//! ```text
//!                       Screen::refresh                        Viewer::pulled(update)
//!   VGA, virtio-gpu <-------------------- display thread ------------------------------> viewers (VNC clients)
//!                                              |   ^                                          |
//!                                   writes     v   | wake: somebody is hungry                 |
//!                                       the View (RwLock) <-----------------------------------+ reads what changed
//! ```
//!
//! How often it pulls:
//!
//! ```text
//!   nobody is hungry        never
//!   the picture changes     every 16 ms
//!   nothing changes         less and less often, down to 5 times a second; input makes it quick again
//! ```
//!
//! A viewer that is busy is not hungry, so that a slow one costs nothing, and nobody holds the view's lock while
//! it waits for a client.

use std::io::{self, Write};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lodge_devices::display::{Cursor, Picture, Screen, Update};

/// The shortest time between two pulls.
const QUICK: Duration = Duration::from_millis(16);
/// The longest, while somebody is hungry.
const SLOW: Duration = Duration::from_millis(200);
/// So many pulls without a change are made quickly: half a second.
const PATIENCE: u32 = 30;

/// What there is to see.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The picture at the last pull; empty before the first.
    pub picture: Picture,
    /// The pointer's shape, if the guest leaves it to its viewers; `Some(None)` is an invisible one.
    pub cursor: Option<Option<Arc<Cursor>>>,
}

/// Somebody who looks at a [`Display`].
pub trait Viewer: Send + Sync {
    /// Whether it waits for a newer picture.
    fn is_hungry(&self) -> bool;

    /// The view was pulled and this changed, if anything. Called by the display thread: must not wait for anything.
    fn pulled(&self, update: &Update);
}

/// The guest's display. Its thread ends when it is dropped.
pub struct Display {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    screen: Arc<dyn Screen>,
    view: RwLock<View>,
    control: Mutex<Control>,
    /// `control` changed, for the thread.
    wake: Condvar,
    /// A pull is finished, for those who asked for one.
    pulled: Condvar,
}

#[derive(Default)]
struct Control {
    viewers: Vec<Weak<dyn Viewer>>,
    /// Pulls that were asked for, and those made; only the difference means something.
    asked: u64,
    made: u64,
    /// Pulls since the last change.
    quiet: u32,
    stop: bool,
}

impl Display {
    /// Starts the thread. Nothing is pulled before somebody looks.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn start(screen: Arc<dyn Screen>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            screen,
            view: RwLock::default(),
            control: Mutex::default(),
            wake: Condvar::new(),
            pulled: Condvar::new(),
        });
        let for_thread = shared.clone();
        let thread =
            std::thread::Builder::new().name("display".into()).spawn(move || for_thread.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A fresh copy of the picture: what the guest shows at this moment.
    pub fn picture(&self) -> Picture {
        self.fresh();
        self.view().picture.clone()
    }

    /// Has the view pulled, and waits until that is done.
    pub fn fresh(&self) {
        let mut control = self.shared.control();
        // A pull under way may have begun before this call: the next one counts.
        control.asked += 1;
        let ticket = control.asked;
        self.shared.wake.notify_one();
        while control.made < ticket && !control.stop {
            control = wait(&self.shared.pulled, control);
        }
    }

    /// The view at the last pull. The guard must not be kept while waiting for anything.
    pub fn view(&self) -> RwLockReadGuard<'_, View> {
        self.shared.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a viewer, for as long as somebody keeps it.
    pub fn attach(&self, viewer: Weak<dyn Viewer>) {
        self.shared.control().viewers.push(viewer);
    }

    /// A viewer has become hungry.
    pub fn wake(&self) {
        // The lock orders this with the thread's look at the viewers.
        drop(self.shared.control());
        self.shared.wake.notify_one();
    }

    /// Somebody did something: the picture is likely to change soon.
    pub fn nudge(&self) {
        let mut control = self.shared.control();
        if control.quiet > 0 {
            control.quiet = 0;
            self.shared.wake.notify_one();
        }
    }

    /// Tells the guest which size somebody would like. False if its screen cannot.
    pub fn suggest_size(&self, width: u32, height: u32) -> bool {
        self.shared.screen.suggest_size(width, height)
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.shared.control().stop = true;
        self.shared.wake.notify_one();
        self.shared.pulled.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by its own message.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn control(&self) -> MutexGuard<'_, Control> {
        // Its fields are consistent after each statement.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn view_mut(&self) -> RwLockWriteGuard<'_, View> {
        self.view.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut last: Option<Instant> = None;
        while let Some((viewers, ticket)) = self.wait_for_work(last) {
            last = Some(Instant::now());
            let update = self.pull();
            let changed = update.resized || !update.dirty.is_empty() || update.cursor.is_some();
            for viewer in &viewers {
                viewer.pulled(&update);
            }
            let mut control = self.control();
            control.quiet = if changed { 0 } else { control.quiet.saturating_add(1) };
            // Numbers up to what was asked for before this pull began.
            control.made = ticket;
            self.pulled.notify_all();
        }
    }

    /// Waits until there is a reason to pull and it is time to; gives all viewers and the newest number that was asked
    /// for. Nothing when it is over.
    fn wait_for_work(&self, last: Option<Instant>) -> Option<(Vec<Arc<dyn Viewer>>, u64)> {
        let mut control = self.control();
        loop {
            if control.stop {
                return None;
            }
            control.viewers.retain(|viewer| viewer.strong_count() > 0);
            let viewers: Vec<_> = control.viewers.iter().filter_map(Weak::upgrade).collect();
            let asked = control.asked > control.made;
            if !asked && !viewers.iter().any(|viewer| viewer.is_hungry()) {
                control = wait(&self.wake, control);
                continue;
            }
            let pace = if asked { Duration::ZERO } else { pace(control.quiet) };
            let left = last.map_or(Duration::ZERO, |at| (at + pace).duration_since(Instant::now()));
            if left.is_zero() {
                let ticket = control.asked;
                return Some((viewers, ticket));
            }
            let waited = self.wake.wait_timeout(control, left);
            control = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn pull(&self) -> Update {
        let mut view = self.view_mut();
        let update = self.screen.refresh(&mut view.picture);
        if let Some(cursor) = &update.cursor {
            view.cursor = Some(cursor.clone());
        }
        update
    }
}

/// The time between two pulls after so many without a change.
fn pace(quiet: u32) -> Duration {
    let steps = quiet.saturating_sub(PATIENCE);
    (QUICK + Duration::from_millis(4) * steps).min(SLOW)
}

fn wait<'a>(condition: &Condvar, control: MutexGuard<'a, Control>) -> MutexGuard<'a, Control> {
    condition.wait(control).unwrap_or_else(PoisonError::into_inner)
}

/// Writes the picture as a PNG file (ISO/IEC 15948), in RGB.
///
/// # Errors
/// The writer's, or the picture is empty.
pub fn write_png(picture: &Picture, out: impl Write) -> io::Result<()> {
    let mut encoder = png::Encoder::new(out, picture.width, picture.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let rgb: Vec<u8> = picture
        .pixels
        .iter()
        .flat_map(|pixel| {
            let [_, r, g, b] = pixel.to_be_bytes();
            [r, g, b]
        })
        .collect();
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb)?;
    Ok(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[derive(Default)]
    struct Counting {
        pulls: AtomicUsize,
    }

    impl Screen for Counting {
        fn refresh(&self, picture: &mut Picture) -> Update {
            let count = self.pulls.fetch_add(1, Ordering::SeqCst) as u32 + 1;
            let resized = picture.width == 0;
            if resized {
                *picture = Picture::black(4, 2);
            }
            picture.pixels[0] = count;
            Update { resized, dirty: picture.whole().into_iter().collect(), cursor: None }
        }

        fn suggest_size(&self, width: u32, _: u32) -> bool {
            width == 4
        }
    }

    #[derive(Default)]
    struct Hungry {
        hungry: AtomicBool,
        pulled: Mutex<usize>,
        more: Condvar,
    }

    impl Viewer for Hungry {
        fn is_hungry(&self) -> bool {
            self.hungry.load(Ordering::SeqCst)
        }

        fn pulled(&self, update: &Update) {
            assert!(!update.dirty.is_empty());
            *self.pulled.lock().unwrap() += 1;
            self.more.notify_all();
        }
    }

    #[test]
    fn each_picture_is_fresh() {
        let screen = Arc::new(Counting::default());
        let display = Display::start(screen.clone()).unwrap();
        for expected in 1..20 {
            assert_eq!(display.picture().pixels[0], expected);
        }
        assert_eq!(screen.pulls.load(Ordering::SeqCst), 19);
        assert!(display.suggest_size(4, 4) && !display.suggest_size(5, 4));
    }

    #[test]
    fn nothing_is_pulled_for_nobody() {
        let screen = Arc::new(Counting::default());
        let display = Display::start(screen.clone()).unwrap();
        let viewer = Arc::new(Hungry::default());
        let weak: Weak<dyn Viewer> = Arc::downgrade(&(viewer.clone() as Arc<dyn Viewer>));
        display.attach(weak);
        display.wake();
        display.nudge();
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(screen.pulls.load(Ordering::SeqCst), 0);

        viewer.hungry.store(true, Ordering::SeqCst);
        display.wake();
        let mut pulled = viewer.pulled.lock().unwrap();
        while *pulled < 3 {
            pulled = viewer.more.wait(pulled).unwrap();
        }
        drop(pulled);

        viewer.hungry.store(false, Ordering::SeqCst);
        display.fresh();
        let before = screen.pulls.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(60));
        // A pull may have begun while the viewer was still hungry.
        assert!(screen.pulls.load(Ordering::SeqCst) <= before + 1);
        drop(viewer);
        drop(display);
    }

    #[test]
    fn an_idle_picture_is_pulled_seldom() {
        assert_eq!(pace(0), QUICK);
        assert_eq!(pace(PATIENCE), QUICK);
        assert!(pace(PATIENCE + 1) > QUICK);
        assert_eq!(pace(u32::MAX), SLOW);
    }

    #[test]
    fn png_holds_the_picture() {
        let picture = Picture { width: 2, height: 1, pixels: vec![0x0011_2233, 0x00ff_0080] };
        let mut file = Vec::new();
        write_png(&picture, &mut file).unwrap();
        let mut reader = png::Decoder::new(io::Cursor::new(file)).read_info().unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut rgb).unwrap();
        assert_eq!((info.width, info.height), (2, 1));
        assert_eq!(rgb, [0x11, 0x22, 0x33, 0xff, 0, 0x80]);
        assert!(write_png(&Picture::default(), &mut Vec::new()).is_err());
    }
}
