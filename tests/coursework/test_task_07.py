"""Task 7: policy.Policy.positions. No model: two facts of the checkpoint are enough."""

from functools import partial
from types import SimpleNamespace

from policy import Policy

from .check import expect

PLACEHOLDER = 9


def positions(ids, *grids):
    policy = object.__new__(Policy)
    policy.image_pad, policy.merge = PLACEHOLDER, 2
    images = [SimpleNamespace(grid=(1, height, width)) for height, width in grids]
    return policy.positions(ids, images)


def columns(ids, *grids):
    """One (time, height, width) for each id; a text that names the shape if it is not [3, T]."""
    result = positions(ids, *grids)
    if result.shape[0] != 3:
        return f"shape {list(result.shape)}"
    return [tuple(column) for column in result.T.tolist()]


def test_text_advances_by_one():
    expect(lambda: columns([1, 2, 3, 4]), [(i, i, i) for i in range(4)], {
        "the result is [T, 3]; [3, T] is asked": "shape [4, 3]",
        "positions start at 0": [(i, i, i) for i in range(1, 5)],
        "text advances in time alone; all three advance": [(i, 0, 0) for i in range(4)],
    }, "four words")


def test_an_image_of_2_rows_and_3_columns():
    """4 x 6 patches are merged 2 x 2. The image starts at 1 and the text after it at 1 + 3."""

    def picture(p=1, rows=2, columns=3, after=None):
        return [(0, 0, 0), *((p, p + y, p + x) for y in range(rows) for x in range(columns)),
                (after,) * 3, (after + 1,) * 3]

    def image_of(place, outer=range(2), inner=range(3)):
        return [(0, 0, 0), *(place(a, b) for a in outer for b in inner), (4, 4, 4), (5, 5, 5)]

    expect(lambda: columns([1, *[PLACEHOLDER] * 6, 2, 3], (4, 6)), picture(after=4), {
        "the text after an image starts at p + rows * columns; at p + max(rows, columns)":
            picture(after=7),
        "the text after an image starts at p + rows; at p + max(rows, columns)": picture(after=3),
        "the text after an image starts at p + 1, inside the image": picture(after=2),
        "the text after an image starts one too far": picture(after=5),
        "the text after an image restarts at 0": picture(after=0),
        "placeholders are numbered like text: nothing of the image's shape is in the positions":
            [(i,) * 3 for i in range(9)],
        "rows and columns count from 0; they count from p on": image_of(lambda y, x: (1, y, x)),
        "height and width are exchanged": image_of(lambda y, x: (1, 1 + x, 1 + y)),
        "the image is numbered column by column; its placeholders go row by row":
            image_of(lambda x, y: (1, 1 + y, 1 + x), range(3), range(2)),
        "the time advances within an image; a picture is one moment":
            image_of(lambda y, x: (1 + 3 * y + x, 1 + y, 1 + x)),
        "the grid counts patches; merge x merge of them are one token": "raised ValueError",
    }, "a word, an image, two words")


def test_a_second_image_starts_after_the_text_before_it():
    expect(lambda: columns([*[PLACEHOLDER] * 2, 1, *[PLACEHOLDER] * 2, 2], (2, 4), (4, 2)),
           [(0, 0, 0), (0, 0, 1), (2, 2, 2), (3, 3, 3), (3, 4, 3), (5, 5, 5)], {
        "the second image restarts at 0; it starts where the text before it ended": [
            (0, 0, 0), (0, 0, 1), (2, 2, 2), (0, 0, 0), (0, 1, 0), (2, 2, 2)],
        "every image has the shape of the first": [
            (0, 0, 0), (0, 0, 1), (2, 2, 2), (3, 3, 3), (3, 3, 4), (5, 5, 5)],
    }, "an image, a word, an image, a word")
    expect(lambda: columns([*[PLACEHOLDER] * 2], (2, 2), (2, 2)), [(0, 0, 0), (1, 1, 1)], {
        "two images side by side are taken for one: the image's shape tells where it ends":
            "raised ValueError",
    }, "two images of one token each, side by side")


def refuses(ids, grids) -> bool:
    try:
        positions(ids, *grids)
    except ValueError:
        return True
    return False


def test_images_and_placeholders_must_match():
    for words, ids, grids in (
            ("placeholders without an image must be refused: ValueError", [PLACEHOLDER], ()),
            ("an image without placeholders must be refused: ValueError", [1], ((2, 2),)),
            ("too few placeholders must be refused: ValueError", [PLACEHOLDER], ((4, 4),)),
            ("too many placeholders must be refused: ValueError", [PLACEHOLDER] * 3, ((2, 4),))):
        expect(partial(refuses, ids, grids), True, {
            words: False,
            words + " (your own, with words)": "raised StopIteration",
            words + " (your own, in words)": "raised IndexError",
        }, words)
