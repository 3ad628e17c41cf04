from nextstep_jax.interop.published_config import model_from_published
from tests.interop.test_published_config import OLDER, RECORDED, message


def test_tokens_of_images_are_distinct():
    for values, said in (
        ({"eoi": 500}, "boi_id and eoi_id are both 500"),
        ({"image_placeholder_id": 500}, "boi_id and image_placeholder_id are both 500"),
        ({"pad_token_id_added": 501}, "pad_id and eoi_id are both 501"),
        ({"image_area_id": 502}, "image_placeholder_id and image_area_id are both 502"),
    ):
        told = message(model_from_published, {**RECORDED, **values})
        names = said.split(" are both ")[0].split(" and ")
        assert said in told or f"{names[1]} and {names[0]} are both {said.split()[-1]}" in told


def test_sizes_of_two_generations_may_differ():
    """The class default of one generation beside the value of the other; neither is used."""
    assert model_from_published({**OLDER, "latent_size": 32}).config == (
        model_from_published(OLDER).config
    )
