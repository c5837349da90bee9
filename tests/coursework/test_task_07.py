"""Task 7: policy.Policy.positions. No model: two facts of the checkpoint are enough."""

from types import SimpleNamespace

from policy import Policy

from .check import expect

HOLDER = 9


def positions(ids, *grids):
    policy = object.__new__(Policy)
    policy.image_pad, policy.merge = HOLDER, 2
    return policy.positions(ids,
                            [SimpleNamespace(grid=(1, height, width)) for height, width in grids])


def columns(ids, *grids):
    """One (time, height, width) for each id."""
    result = positions(ids, *grids)
    return [tuple(column)
            for column in result.T.tolist()] if result.shape[
        0] == 3 else f"shape {list(result.shape)}"


def test_text_advances_by_one():
    expect(lambda: columns([1, 2, 3, 4]), [(i, i, i) for i in range(4)], {
        "the result is [T, 3]; [3, T] is asked": "shape [4, 3]",
        "positions start at 0": [(i, i, i) for i in range(1, 5)],
        "text advances in time alone; all three advance": [(i, 0, 0) for i in range(4)]},
           "four words")


def test_an_image_of_2_rows_and_3_columns():
    """Grid 4 x 6 patches, merged 2 x 2. It starts at 1; the text after it at 1 + 3."""
    def picture(p=1, rows=2, columns=3, after=None):
        return [(0, 0, 0), *((p, p + y, p + x) for y in range(rows) for x in range(columns)),
                (after,) * 3, (after + 1,) * 3]
    right = picture(after=4)
    expect(lambda: columns([1, *[HOLDER] * 6, 2, 3], (4, 6)), right, {
        "the text after an image starts at p + rows * columns; at p + max(rows, columns)": picture(
        after=7),
        "the text after an image starts at p + rows; at p + max(rows, columns)": picture(after=3),
        "the text after an image starts at p + 1, inside the image": picture(after=2),
        "the text after an image starts one too far": picture(after=5),
        "the text after an image restarts at 0": picture(after=0),
        "place holders are numbered like text: nothing of the image's shape is in the positions": [(i,) * 3 for i in range(9)],
        "rows and columns count from 0; they count from p on": [
            (0, 0, 0), *((1, y, x) for y in range(2) for x in range(3)), (4, 4, 4), (5, 5, 5)],
        "height and width are exchanged": [(0, 0, 0),
                                           *((1, 1 + x, 1 + y) for y in range(2) for x in range(3)),
                                           (4,) * 3, (5,) * 3],
        "the image is numbered column by column; its place holders go row by row": [
            (0, 0, 0), *((1, 1 + y, 1 + x) for x in range(3) for y in range(2)), (4,) * 3,
            (5,) * 3],
        "the time advances within an image; a picture is one moment": [
            (0, 0, 0), *((1 + 3 * y + x, 1 + y, 1 + x) for y in range(2) for x in range(3)), (4,
            ) * 3, (5,) * 3],
        "the grid counts patches; merge x merge of them are one id": "raised ValueError",
    }, "a word, an image, two words")


def test_a_second_image_goes_on():
    expect(lambda: columns([*[HOLDER] * 2, 1, *[HOLDER] * 2, 2], (2, 4), (4, 2)),
           [(0, 0, 0), (0, 0, 1), (2, 2, 2), (3, 3, 3), (3, 4, 3), (5, 5, 5)], {
        "the second image restarts at 0; it starts where the text before it ended": [
            (0, 0, 0), (0, 0, 1), (2, 2, 2), (0, 0, 0), (0, 1, 0), (2, 2, 2)],
        "every image has the shape of the first": [
            (0, 0, 0), (0, 0, 1), (2, 2, 2), (3, 3, 3), (3, 3, 4), (5, 5, 5)]},
           "an image, a word, an image, a word")
    expect(lambda: columns([*[HOLDER] * 2], (2, 2), (2, 2)), [(0, 0, 0), (1, 1, 1)], {
        "two images side by side are taken for one: the image's shape tells where it ends": "raised ValueError"},
        "two images of one id each, side by side")


def test_images_and_place_holders_must_match():
    for words, ids, grids in (
            ("place holders without an image must be refused: ValueError", [HOLDER], ()),
            ("an image without place holders must be refused: ValueError", [1], ((2, 2),)),
            ("too few place holders must be refused: ValueError", [HOLDER], ((4, 4),)),
            ("too many place holders must be refused: ValueError", [HOLDER] * 3, ((2, 4),))):
        def refused():
            try:
                positions(ids, *grids)
            except ValueError:
                return True
            return False
        expect(refused, True, {words: False,
                               words + " (your own, with words)": "raised StopIteration",
                               words + " (your own, in words)": "raised IndexError"}, words)
