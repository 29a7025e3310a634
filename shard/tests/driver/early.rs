//! A kernel that may begin before the one before it has ended does so: what it reads before it waits is old.

use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUstream};

use super::gpu::{
    Gate, allocate, arguments, download, enter, kernel, launch, launch_early, number, stream, synchronize,
    upload,
};
use super::graphs;

const BLOCK: u32 = 40;

/// Three words of which the first is copied to the second, and that one to the third, by a kernel that may begin early.
struct Copies {
    words: [CUdeviceptr; 3],
    copy_word: CUfunction,
}

impl Copies {
    fn new() -> Self {
        Self { words: [upload(&[3_u32]), upload(&[2_u32]), upload(&[1_u32])], copy_word: kernel("copy_word") }
    }

    fn first(&self, stream: CUstream) {
        let [from, to, _] = self.words;
        launch(self.copy_word, 1, BLOCK, stream, &mut arguments![from, 0_u32, to]);
    }

    fn second(&self, reads_early: bool, stream: CUstream) {
        let ([_, from, to], reads_early) = (self.words, u32::from(reads_early));
        launch_early(self.copy_word, BLOCK, stream, &mut arguments![from, reads_early, to]);
    }

    fn copied(&self) -> [u32; 2] {
        [1, 2].map(|i| download::<u32>(self.words[i], 1)[0])
    }
}

#[test]
fn what_is_read_before_the_wait_is_old() {
    enter(number::SHARED);
    for (reads_early, seen) in [(true, 2), (false, 3)] {
        let (stream, copies) = (stream(), Copies::new());
        let gate = Gate::new(stream);
        copies.first(stream);
        copies.second(reads_early, stream);
        gate.open();
        synchronize(stream);
        assert_eq!(copies.copied(), [3, seen]);
    }
}

#[test]
fn kernels_of_a_graph_begin_early_too() {
    enter(number::SHARED);
    for (reads_early, seen) in [(true, [2, 3]), (false, [3, 3])] {
        let (stream, copies) = (stream(), Copies::new());
        let (count_threads, count, places) = (kernel("count_threads"), upload(&[0_u32]), allocate(32 * 8));
        graphs::begin(stream, graphs::THREAD_LOCAL);
        copies.first(stream);
        copies.second(reads_early, stream);
        // One more that follows one that has begun early.
        launch(count_threads, 1, 32, stream, &mut arguments![count, places]);
        let graph = graphs::end(stream).unwrap();
        for seen in seen {
            ok!(cuGraphLaunch(graph, stream));
            synchronize(stream);
            assert_eq!(copies.copied(), [3, seen]);
        }
        assert_eq!(download::<u32>(count, 1), [64]);
        ok!(cuGraphExecDestroy(graph));
    }
}

#[test]
fn nothing_but_a_kernel_is_overtaken() {
    enter(number::SHARED);
    let (stream, copies) = (stream(), Copies::new());
    let gate = Gate::new(stream);
    ok!(cuMemsetD32Async(copies.words[1], 9, 1, stream));
    copies.second(true, stream);
    gate.open();
    synchronize(stream);
    assert_eq!(copies.copied(), [9, 9]);
}
