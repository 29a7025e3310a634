use super::*;
use crate::media::PictureError;

#[test]
fn media_cost_no_more_together_than_one_may() {
    assert!(check_decoding([MAX_DECODED_PIXELS].into_iter()).is_ok());
    for pixels in [vec![MAX_DECODED_PIXELS, 1], vec![MAX_DECODED_PIXELS / 8; 9], vec![u64::MAX; 2]] {
        let refused = check_decoding(pixels.into_iter()).unwrap_err();
        let Refusal::Invalid(faults) = refused else { panic!("{refused:?}") };
        assert_eq!(faults[0].field, "chat");
    }
}

/// What could not be measured for now is refused for now, and is never left out.
#[test]
fn media_that_find_no_worker_refuse_their_request() {
    let place = PartIndex { message: 0, part: 0 };
    let overloaded = || {
        let error = WorkersError::Overloaded { what: "test", limit: 1 };
        (place, Err(MediaError::Image(PictureError::Workers(error))))
    };
    let refused = all_media::<()>(vec![(place, Ok(())), overloaded(), (place, Ok(()))]).unwrap_err();
    assert!(matches!(refused, Refusal::Exhausted(_)), "{refused:?}");
    assert_eq!(all_media(vec![(place, Ok(7))]).unwrap(), [(place, 7)]);
}
