//! What can be asked about drawings in words that the checkpoint has learnt, and whether an answer is right.

use serde_json::Value;

use super::draw::{Bounds, Shape};
use super::scenes::{Direction, Scene};

/// A question, and what is right to answer.
#[derive(Debug, Clone)]
pub struct Question {
    /// What is asked.
    pub text: String,
    /// What is right.
    pub expected: Expected,
}

/// What is right to answer.
#[derive(Debug, Clone)]
pub enum Expected {
    /// This, to the letter.
    Text(String),
    /// A box, as JSON, that shares at least half of what it and this one cover together.
    Bounds(Bounds),
}

/// How much of what two boxes cover together they share if they are said to be the same.
const SAME_BOX: f64 = 0.5;

impl Question {
    fn new(text: impl Into<String>, expected: impl Into<String>) -> Self {
        Question { text: text.into(), expected: Expected::Text(expected.into()) }
    }

    /// What is in a picture; `None` where two answers would be right.
    pub fn what(scene: &Scene) -> Option<Self> {
        Some(Question::new("What is in the picture?", scene.description()?))
    }

    /// How many shapes there are.
    pub fn how_many(scene: &Scene) -> Self {
        Question::new("How many shapes are there?", scene.shapes.len().to_string())
    }

    /// The box of a shape.
    pub fn whereabouts(shape: &Shape) -> Self {
        Question { text: format!("Where is the {}?", shape.name()), expected: Expected::Bounds(shape.bounds) }
    }

    /// What is in a film with one shape.
    pub fn what_film(shape: &Shape) -> Self {
        Question::new("What is in the video?", shape.name_with_article())
    }

    /// Where a shape moves.
    pub fn which_way(shape: &Shape, direction: Direction) -> Self {
        Question::new(format!("Which way does the {} move?", shape.name()), direction.name())
    }

    /// When a shape appears.
    pub fn which_second(shape: &Shape, second: u32) -> Self {
        Question::new(format!("At which second does the {} appear?", shape.name()), second.to_string())
    }

    /// Which of two pictures has a shape of this name, as at least one of them does.
    pub fn which_picture(shape: &Shape, pictures: [&Scene; 2]) -> Self {
        let has = pictures.map(|scene| scene.shapes.iter().any(|other| other.name() == shape.name()));
        let answer = match has {
            [true, true] => "both",
            [true, false] => "the first",
            [false, true] => "the second",
            [false, false] => unreachable!("the shape is of one of the pictures"),
        };
        Question::new(format!("Which picture shows {}?", shape.name_with_article()), answer)
    }

    /// Whether an answer is right.
    pub fn is_right(&self, answer: &str) -> bool {
        match &self.expected {
            Expected::Text(text) => answer == text,
            Expected::Bounds(bounds) => {
                boxed(answer).is_some_and(|answered| answered.overlap(*bounds) >= SAME_BOX)
            }
        }
    }
}

/// The box in an answer such as `{"bbox_2d": [10, 20, 60, 70], "label": "red circle"}`.
pub fn boxed(answer: &str) -> Option<Bounds> {
    let answer: Value = serde_json::from_str(answer).ok()?;
    let sides: [u16; 4] = serde_json::from_value(answer.get("bbox_2d")?.clone()).ok()?;
    let [left, top, right, bottom] = sides.map(i32::from);
    Some(Bounds { left, top, right, bottom })
}

#[cfg(test)]
mod tests {
    use super::super::draw::{Color, Kind};
    use super::*;

    #[test]
    fn a_box_is_right_when_half_of_what_is_covered_is_shared() {
        let shape = Shape { kind: Kind::Ring, color: Color::White, bounds: Bounds::square(20, 20, 40) };
        let question = Question::whereabouts(&shape);
        assert_eq!(question.text, "Where is the white ring?");
        assert!(question.is_right(r#"{"bbox_2d": [20, 20, 60, 60], "label": "white ring"}"#));
        assert!(question.is_right(r#"{"bbox_2d": [30, 20, 65, 60], "label": "white ring"}"#));
        assert!(!question.is_right(r#"{"bbox_2d": [45, 20, 85, 60], "label": "white ring"}"#));
        let endless = r#"{"bbox_2d": [0, 0, 2147483000, 9]}"#;
        for wrong in ["", "no", "{}", r#"{"bbox_2d": [1, 2, 3]}"#, r#"{"bbox_2d": "20"}"#, endless] {
            assert!(!question.is_right(wrong), "{wrong}");
        }
    }

    #[test]
    fn words_are_right_to_the_letter() {
        let shape = Shape { kind: Kind::Ring, color: Color::Orange, bounds: Bounds::square(20, 20, 40) };
        let question = Question::what_film(&shape);
        assert!(question.is_right("an orange ring"));
        assert!(!question.is_right("a orange ring"));
    }
}
