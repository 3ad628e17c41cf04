import pytest

from nextstep_jax.data import buckets


def test_the_seventeen_grids():
    grids = buckets.ASPECT_GRIDS
    assert len(grids) == 17
    assert grids[0] == (8, 32) and grids[3] == (11, 23) and grids[8] == (16, 16)
    assert grids[9] == (17, 15) and grids[16] == (32, 8)
    assert [(c, r) for r, c in grids[::-1]] == list(grids)
    # Widest first, and none has more than the square's 256 tokens or less than 245.
    aspects = [rows / columns for rows, columns in grids]
    assert aspects == sorted(aspects)
    products = [r * c for r, c in grids]
    assert max(products) == 256 and min(products) == 247


@pytest.mark.parametrize(("base", "factor"), [(256, 1), (512, 2), (768, 3), (1024, 4)])
def test_bases_scale_the_grids(base, factor):
    expected = tuple((factor * r, factor * c) for r, c in buckets.ASPECT_GRIDS)
    assert buckets.grids_of_base(base) == expected


def test_small_bases_keep_what_scales_exactly():
    assert buckets.grids_of_base(64) == ((2, 8), (4, 4), (8, 2))
    assert buckets.grids_of_base(128) == ((4, 16), (7, 9), (8, 8), (9, 7), (16, 4))
    assert buckets.grids_of_base(80) == ((5, 5),)
    assert buckets.grids_of_base(64, stride=4) == buckets.grids_of_base(256)
    assert buckets.grids_of_base(512, square_only=True) == ((32, 32),)
    with pytest.raises(ValueError, match="base=100 must be a positive multiple of stride=16"):
        buckets.grids_of_base(100)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((512, 512), (16, 16)),
        ((1080, 1920), (12, 21)),  # 0.5625; 12/21 = 0.571, 11/23 = 0.478, 13/19 = 0.684
        ((1920, 1080), (21, 12)),
        ((300, 451), (13, 19)),  # 0.665; 12/21 = 0.571, 14/18 = 0.778
        ((10, 1000), (8, 32)),
        ((1000, 10), (32, 8)),
        ((480, 500), (16, 16)),  # 0.96; 15/17 = 0.882
    ],
)
def test_nearest_grid(size, grid):
    assert buckets.nearest_grid(*size, 256) == grid
    assert buckets.nearest_grid(*size, 512) == (2 * grid[0], 2 * grid[1])


def test_the_largest_base_whose_area_fits():
    bases = (512, 256, 1024, 768)
    assert buckets.choose_size(512, 512, bases) == (512, 512)
    assert buckets.choose_size(511, 512, bases) == (256, 256)
    assert buckets.choose_size(100, 100, bases) == (256, 256)
    assert buckets.choose_size(3000, 3000, bases) == (1024, 1024)
    assert buckets.choose_size(400, 1600, bases) == (768 // 2, 768 * 2)
    assert buckets.choose_size(400, 1600, bases, square_only=True) == (768, 768)


def test_sizes_of_bases_are_ascending_and_distinct():
    assert buckets.sizes_of_bases((64,)) == ((32, 128), (64, 64), (128, 32))
    assert buckets.sizes_of_bases((64, 32), square_only=True) == ((32, 32), (64, 64))
    sizes = buckets.sizes_of_bases((256, 512, 768, 1024))
    # 12x21, 15x17 ... differ for every base: 4 x 17 sizes, less those that coincide.
    assert list(sizes) == sorted(set(sizes)) and len(sizes) == 68


def test_grid_of_and_its_error():
    assert buckets.grid_of(512, 256) == (32, 16)
    assert buckets.grid_of(64, 32, stride=8) == (8, 4)
    with pytest.raises(ValueError, match=r"60x100 .* are 64x96, 64x112, 48x96, 48x112$"):
        buckets.grid_of(60, 100)
    with pytest.raises(ValueError, match=r"5x32 .* are 16x32$"):
        buckets.grid_of(5, 32)


def test_aspect_grids_are_those_of_all_bases():
    """Against the grids of every base, over all of up to 70 x 70 tokens."""
    # No grid is smaller than its square in both directions: further bases have none of these.
    sides = range(1, 71)
    listed = {grid: side for side in sides for grid in buckets.grids_of_base(side * 16)}
    assert len(listed) > 100 and listed[22, 46] == 32
    for rows in range(1, 71):
        for columns in range(1, 71):
            grid = (rows, columns)
            if side := listed.get(grid):
                assert buckets.aspect_grid_of(rows * 4, columns * 4, 4) == grid
                assert buckets.base_of(grid, 4) == side * 4
            elif (rows + 3 * columns) % 23 == 0:  # The messages take their time.
                with pytest.raises(ValueError, match="off the 17 aspect grids with 4 pixels"):
                    buckets.aspect_grid_of(rows * 4, columns * 4, 4)
                with pytest.raises(ValueError, match=f"no base has the grid of {rows} x {columns}"):
                    buckets.base_of(grid, 4)


def test_no_grid_has_two_bases():
    seen = [grid for side in range(1, 71) for grid in buckets.grids_of_base(side * 16)]
    assert len(set(seen)) == len(seen)
    assert buckets.base_of((26, 38)) == 512 and buckets.base_of((64, 16)) == 512
    assert buckets.base_of((5, 5), stride=8) == 40


@pytest.mark.parametrize(
    ("size", "stride"),
    [((512, 500), 16), ((512, 768), 16), ((1, 5000), 16), ((70, 33), 4), ((500, 2000), 8)],
)
def test_nearest_sizes_are_the_nearest(size, stride):
    """Against a search through every base that could matter."""
    with pytest.raises(ValueError) as error:
        buckets.aspect_grid_of(*size, stride)
    sides = range(1, 3 * max(size) // stride + 3)
    sizes = [
        (rows * stride, columns * stride)
        for side in sides
        for rows, columns in buckets.grids_of_base(side * stride, stride=stride)
    ]
    distance = {s: abs(s[0] - size[0]) + abs(s[1] - size[1]) for s in sizes}
    shown = [buckets.parse_image_key(s) for s in str(error.value).split(" are ")[1].split(", ")]
    assert [distance[s] for s in shown] == sorted(distance.values())[:4]
    for one in shown:  # What is proposed is accepted.
        buckets.aspect_grid_of(*one, stride)


def test_the_message_of_a_size_off_the_grid():
    with pytest.raises(ValueError) as error:
        buckets.aspect_grid_of(512, 500)
    assert str(error.value) == (
        "image size 512x500 (height x width) is off the 17 aspect grids with 16 pixels a token;"
        " the nearest sizes are 512x512, 496x496, 528x528, 480x480"
    )
    for size in ((0, 16), (-16, 16), (8, 8)):
        with pytest.raises(ValueError, match="the nearest sizes are 16x16, 32x32"):
            buckets.aspect_grid_of(*size)


def test_image_keys_are_ordered_as_numbers():
    keys = ["128x128", "64x128", "64x64"]
    assert sorted(keys) == keys
    assert buckets.ordered_image_keys(keys) == ["64x64", "64x128", "128x128"]
    assert buckets.parse_image_key(buckets.image_key((48, 7))) == (48, 7)
