//! The angles that queries and keys are turned by, and their cosines and sines as the host computes them.
//!
//! Angles are f32, as the reference has them: at large positions the rounding of the angle is part of what the model was trained
//! on.

/// Angles `position[axis] * frequency`, for each position (a row) and frequency (a column).
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// Each frequency, and which number of a position it turns with.
    pub frequencies: &'a [(f32, usize)],
    /// What cosines and sines are multiplied by.
    pub scale: f32,
    /// The positions.
    pub positions: &'a [[u32; 3]],
}

impl Angles<'_> {
    /// Writes cosines and sines, `[positions, frequencies]` each.
    ///
    /// # Panics
    /// There is another number of them.
    pub fn fill(&self, cos: &mut [f32], sin: &mut [f32]) {
        let cols = self.frequencies.len();
        assert_eq!([cos.len(), sin.len()], [self.positions.len() * cols; 2], "room for cosines and sines");
        if cols == 0 {
            return;
        }
        let end = self.positions.as_flattened().iter().max().map_or(0, |largest| *largest as usize + 1);
        let rows = cos.chunks_exact_mut(cols).zip(sin.chunks_exact_mut(cols)).zip(self.positions);
        if 4 * end <= self.positions.len() {
            // Many rows of few different numbers, as patches are: each number is turned once.
            let turned: Vec<(f32, f32)> = (0..end as u32)
                .flat_map(|number| {
                    self.frequencies.iter().map(move |(frequency, _)| self.turn(number, *frequency))
                })
                .collect();
            for ((cos, sin), position) in rows {
                for (col, (_, axis)) in self.frequencies.iter().enumerate() {
                    (cos[col], sin[col]) = turned[position[*axis] as usize * cols + col];
                }
            }
            return;
        }
        for ((cos, sin), position) in rows {
            for (col, (frequency, axis)) in self.frequencies.iter().enumerate() {
                (cos[col], sin[col]) = self.turn(position[*axis], *frequency);
            }
        }
    }

    fn turn(&self, number: u32, frequency: f32) -> (f32, f32) {
        let (sin, cos) = f64::from(number as f32 * frequency).sin_cos();
        (cos as f32 * self.scale, sin as f32 * self.scale)
    }
}
