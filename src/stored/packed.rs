//! Bodies as LZ4 packs them: half, as the two tracks of a song repeat its lyrics, and their addresses each other.
//!
//! To unpack one of 2 KiB takes 0.2 to 0.4 microseconds, a thirtieth to a twentieth of a hit, and to pack it one or two
//! (`benches/README.md`). zstd leaves three quarters of what LZ4 leaves and takes eight times as long to unpack it. Bytes
//! are sacred: what is packed is unpacked once and compared, so that nothing is kept that would not come back as it came.

use std::cell::RefCell;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

/// What is shorter has nothing to repeat.
const SHORTEST: usize = 128;

/// What is longer stays as it is, so that no answer keeps a thread busy for longer than some sixty microseconds (packing
/// takes one for each KiB at most); and its length fits 16 bits.
const LONGEST: usize = u16::MAX as usize - 1;

/// What a thread packs with.
struct Packer {
    table: CompressTable,
    packed: Vec<u8>,
    unpacked: Vec<u8>,
}

/// Gives `bytes` packed to `keep`, which may add to them; `None` if that saves less than an eighth.
pub(super) fn with_packed<T>(bytes: &[u8], keep: impl FnOnce(&mut Vec<u8>) -> T) -> Option<T> {
    thread_local! {
        static PACKER: RefCell<Packer> = RefCell::new(Packer {
            table: CompressTable::small(),
            packed: Vec::new(),
            unpacked: Vec::new(),
        });
    }
    if !(SHORTEST..=LONGEST).contains(&bytes.len()) {
        return None;
    }
    PACKER.with_borrow_mut(|packer| packer.pack(bytes).map(keep))
}

impl Packer {
    fn pack(&mut self, bytes: &[u8]) -> Option<&mut Vec<u8>> {
        self.packed.resize(get_maximum_output_size(bytes.len()), 0);
        let length = compress_into_with_table(bytes, &mut self.packed, &mut self.table).ok()?;
        self.packed.truncate(length);
        self.unpacked.clear();
        let saves_enough = length <= bytes.len() - bytes.len() / 8;
        let is_true = saves_enough && unpack(&self.packed, bytes.len(), &mut self.unpacked) && self.unpacked == bytes;
        is_true.then_some(&mut self.packed)
    }
}

/// Adds to `out` the `length` bytes that were packed. Gives whether there were as many.
pub(super) fn unpack(packed: &[u8], length: usize, out: &mut Vec<u8>) -> bool {
    let before = out.len();
    out.resize(before + length, 0);
    decompress_into(packed, &mut out[before..]).is_ok_and(|unpacked| unpacked == length)
}
