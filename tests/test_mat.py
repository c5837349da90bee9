"""data/mat.py: how files that others wrote become samples, and what happens when a file is wrong.
extras/files.py: the list of everything that is wrong in them."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import mat
from data.mat import DataError, Sample, load, read_image
from extras.files import check, image_defect, join_report

REAL = Path(__file__).parents[2] / "shared" / "mat-sample" / "MAT"
real_files = pytest.mark.skipif(not REAL.exists(),
                                reason="the published sample is not on this machine")

CODING = {"id": 71, "question": "What year?", "answers": ["1999"], "ori_image_path": "a_ori.png",
          "processed_image_path": "a_proc.png", "type": ["rotation90", "dark"], "split": "hard"}
SEARCH = {"id": 76, "question": "Who?", "answer": "Vermeer", "image_path": "1.jpg",
          "reference": "more fields"}
QA = {"id": "dev_0", "question": "Who?", "golden_answers": ["Ann", "Anne"], "metadata": {}}


def write_mat(folder: Path, task: str, split: str, rows, images=()) -> Path:
    """A MAT folder with one file of rows, and small grey images."""
    file, home = mat.FILES[task][split]
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / home).mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(rows if isinstance(rows, str) else json.dumps(rows),
                               encoding="utf-8")
    for name in images:
        Image.new("RGB", (8, 6), "grey").save(folder / home / name, format="PNG")
    return folder


def steps(image="a", question="What year?", problems="{'dark'}", answer="1999",
          code=True) -> list[dict]:
    """The training rows of one question as published: the answer step names the clean image."""
    rows = [("pre_problem", "_proc.png", f"<problem> {problems} </problem>"),
            ("pre_code", "_proc.png", "<code>\n```python\npass\n```\n</code>"),
            ("pre_answer", "_ori.png", f"<answer> {answer} </answer>")]
    return [{"type": kind, "image_path": image + ending, "problem": f"<query> {question} </query>",
             "solution": solution, "gt": "<think> ... </think>\n" + solution}
            for kind, ending, solution in rows if code or kind != "pre_code"]


# --- the benchmarks -------------------------------------------------------------------------------


def test_a_coding_row_becomes_a_sample(tmp_path):
    write_mat(tmp_path, "mat-coding", "test", [CODING])
    images = tmp_path / "MAT-Benchmark" / "MAT-Coding-image"
    assert load("mat-coding", tmp_path, "test") == [
        Sample(id="71", question="What year?", golds=("1999",), image_path=images / "a_proc.png",
               problems=("rotation90", "dark"), queries=(), split="hard")]


def test_a_crop_question_shows_the_whole_picture(tmp_path):
    write_mat(tmp_path, "mat-coding", "test", [{**CODING, "type": ["crop"]}])
    assert load("mat-coding", tmp_path, "test")[0].image_path.name == "a_ori.png"


def test_a_search_row_has_one_gold_and_its_split_by_place(tmp_path):
    write_mat(tmp_path, "mat-search", "test", [{**SEARCH, "id": 75}, SEARCH])
    first, second = load("mat-search", tmp_path, "test")
    assert (first.golds, first.problems, first.image_path.name) == (("Vermeer",), (), "1.jpg")
    assert (first.split, second.split) == ("simple", "hard")    # the first 75 of 150 are simple


def test_the_split_is_the_rows_own_word_before_its_place():
    assert mat.split_of("mat-coding", {"id": 200, "split": "simple"}, 199) == "simple"
    for place, split in ((1, "simple"), (70, "simple"), (71, "hard")):
        assert mat.split_of("mat-coding", {"id": place}, 0) == split
        assert mat.split_of("mat-coding", {}, place - 1) == split


@real_files
def test_the_published_benchmark_rows():
    samples = load("mat-coding", REAL, "test")
    assert [(s.id, s.split, s.problems, s.image_path.name) for s in samples] == [
        ("12", "simple", ("rotation180",), "rotation180_1_proc.png"),
        ("22", "simple", ("dark",), "dark_1_proc.png"),
        ("63", "simple", ("none",), "none_2_proc.png"),
        ("119", "hard", ("crop",), "crop_8_ori.png")]
    assert samples[0].golds == ("1 Can (473ml)",)
    assert samples[0].open_image().size == (1500, 1500)
    search, = load("mat-search", REAL, "test")
    assert (search.id, search.golds, search.split) == ("81", ("Yes",), "hard")
    image = search.open_image()                 # an RGBA PNG that is named 23.jpg
    assert image.mode == "RGB" and image.size == (960, 1079)


# --- training: steps are joined into samples ------------------------------------------------------


def test_three_steps_become_one_sample(tmp_path):
    write_mat(tmp_path, "mat-coding", "train", steps())
    sample, = load("mat-coding", tmp_path, "train")
    assert (sample.id, sample.question, sample.split) == ("a", "What year?", "train")
    assert (sample.golds, sample.problems) == (("1999",), ("dark",))
    assert sample.image_path.name == "a_proc.png"       # though the answer step names a_ori.png


def test_doubles_none_and_crops(tmp_path):
    rows = (steps("b", problems="{'rotation90', 'dark'}")
            + steps("c", problems="{'none'}", code=False)
            + steps("d", problems="{'crop'}"))
    write_mat(tmp_path, "mat-coding", "train", rows)
    double, none, crop = load("mat-coding", tmp_path, "train")
    assert double.problems == ("rotation90", "dark")
    assert none.problems == ("none",)                   # joined without a code step
    assert none.image_path.name == "c_proc.png"
    assert crop.image_path.name == "d_ori.png"


def test_steps_may_come_in_any_order_and_two_questions_may_share_an_image(tmp_path):
    rows = steps(question="What year?") + steps(question="Which  city?", answer="Rome")
    rows[-1]["problem"] = "<query>Which\ncity?</query>"          # other blanks, the same question
    random.Random(0).shuffle(rows)
    write_mat(tmp_path, "mat-coding", "train", rows)
    samples = load("mat-coding", tmp_path, "train")
    assert sorted(s.id for s in samples) == ["a", "a-2"]
    assert {tuple(s.question.split()): s.golds for s in samples} == {
        ("What", "year?"): ("1999",), ("Which", "city?"): ("Rome",)}


def test_what_cannot_be_joined_is_left_out_and_named(tmp_path):
    rows = steps("whole") + steps("no_answer")[:2] + steps("no_problem")[1:]
    write_mat(tmp_path, "mat-coding", "train", rows)
    assert [s.id for s in load("mat-coding", tmp_path, "train")] == ["whole"]
    summary, first, second = join_report("mat-coding", tmp_path)
    assert summary == "1 samples joined from 7 steps (problem 2, code 3, answer 2); 2 incomplete"
    assert "no_answer" in first and "<answer>" in first
    assert "no_problem" in second and "<problem>" in second


def test_search_steps_join_with_their_queries(tmp_path):
    chain = "<query> Where is it? </query>"
    longer = chain + "<search> painter of it </search><information> Vermeer"
    rows = [{"image_path": "1.jpg", "problem": text, "solution": solution} for text, solution in
            ((chain, "<search> painter of it </search>"),
             (longer, "<search> Vermeer museum </search>"),
             (chain + " and so on", "<answer> Delft </answer>"))]
    write_mat(tmp_path, "mat-search", "train", rows)
    sample, = load("mat-search", tmp_path, "train")
    assert (sample.question, sample.golds, sample.problems) == ("Where is it?", ("Delft",), ())
    assert sample.queries == ("painter of it", "Vermeer museum")


def test_a_file_in_which_nothing_joins_is_an_error(tmp_path):
    write_mat(tmp_path, "mat-coding", "train", steps()[:1])
    with pytest.raises(DataError, match="no question has all its steps.*<answer>"):
        load("mat-coding", tmp_path, "train")


@real_files
def test_the_published_training_rows():
    rotated, clean = load("mat-coding", REAL, "train")
    assert (rotated.id, rotated.problems) == ("rotation180_1", ("rotation180",))
    assert rotated.golds == ("1 Can (473mL)",)
    assert (clean.id, clean.problems, clean.golds) == ("none_2", ("none",), ("Uncommon Valor",))
    report, = join_report("mat-coding", REAL)
    assert report == "2 samples joined from 5 steps (problem 2, code 1, answer 2); 0 incomplete"
    assert "23" in join_report("mat-search", REAL)[1]       # a lone search step, without an answer


# --- text-only questions --------------------------------------------------------------------------


def test_flashrag_rows_from_the_root_from_the_folder_and_from_the_file(tmp_path):
    file = tmp_path / "2wikimultihopqa" / "dev.jsonl"
    file.parent.mkdir()
    odd = json.dumps({**QA, "id": "dev_1", "question": "a\u2028b"}, ensure_ascii=False)
    file.write_text(json.dumps(QA) + "\n\n" + odd + "\n", encoding="utf-8")
    for path in (tmp_path, file.parent, file):
        first, second = load("2wiki", path, "test")
        assert first == Sample(id="dev_0", question="Who?", golds=("Ann", "Anne"), image_path=None)
        assert second.question == "a\u2028b"    # JSON allows U+2028; str.splitlines breaks there
    with pytest.raises(DataError, match="text only"):
        first.open_image()


def test_as_many_questions_as_2wiki_load(tmp_path):
    file = tmp_path / "dev.jsonl"
    with open(file, "w") as out:
        for i in range(12_576):
            out.write(json.dumps({**QA, "id": f"dev_{i}",
                                  "metadata": {"context": ["word " * 40] * 5}}) + "\n")
    assert len(load("2wiki", file, "test")) == 12_576


# --- a message names file, row and field in one or two lines --------------------------------------


@pytest.mark.parametrize("change, words", [
    ({"answers": None}, ["row 2", "'answers'", "null", "None"]),
    ({"answers": []}, ["row 2", "'answers'", "at least one"]),
    ({"answers": ["x", 3]}, ["row 2", "'answers'"]),
    ({"question": 5}, ["row 2", "'question'", "text"]),
    ({"id": True}, ["row 2", "'id'"]),
    ({"processed_image_path": None}, ["row 2", "'processed_image_path'"]),
    ({"type": []}, ["row 2", "'type'"]),
])
def test_a_wrong_field_is_named(tmp_path, change, words):
    write_mat(tmp_path, "mat-coding", "test", [CODING, {**CODING, **change}])
    with pytest.raises(DataError) as error:
        load("mat-coding", tmp_path, "test")
    assert all(word in str(error.value) for word in ["MAT-Coding.json", *words] if word != "null")
    assert str(error.value).count("\n") <= 1


@pytest.mark.parametrize("name", ["id", "question", "answers", "type", "processed_image_path"])
def test_a_missing_field_is_named(tmp_path, name):
    write_mat(tmp_path, "mat-coding", "test",
              [CODING, {k: v for k, v in CODING.items() if k != name}, {}])
    with pytest.raises(DataError, match=rf"row 2: field '{name}' is missing.*and 1 more"):
        load("mat-coding", tmp_path, "test")


@pytest.mark.parametrize("text, words", [
    ("[{", "line 1.*not JSON"), ('[\n{"id": 1},\n', "line 3.*not JSON"),
    ("", "at least one"), ("[]", "at least one"), ('{"id": 1}', "list of at least one object"),
    ("[3]", "row 1.*object"), ('[{"id": 1}, null]', "row 2.*object")])
def test_a_wrong_file_is_named(tmp_path, text, words):
    write_mat(tmp_path, "mat-coding", "test", text)
    with pytest.raises(DataError, match="(?s)MAT-Coding.json.*" + words):
        load("mat-coding", tmp_path, "test")


def test_a_broken_line_of_a_jsonl_file_is_counted_in_the_file(tmp_path):
    (tmp_path / "dev.jsonl").write_text(json.dumps(QA) + "\n\n" + '{"id": \n')
    with pytest.raises(DataError, match="dev.jsonl: line 3: not JSON"):
        load("musique", tmp_path / "dev.jsonl", "test")


def test_bytes_that_are_no_text_and_byte_order_marks(tmp_path):
    (tmp_path / "dev.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load("musique", tmp_path, "test")
    # some editors add a byte order mark
    (tmp_path / "dev.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(QA).encode())
    assert len(load("musique", tmp_path, "test")) == 1


@pytest.mark.parametrize("task, split, words", [
    ("mat-codding", "test", "unknown task 'mat-codding'.*mat-coding"),
    ("bamboogle", "train", "no split 'train'"),
    ("mat-coding", "test", "MAT-Coding.json: no such file.*laolao77/MAT"),
    ("hotpotqa", "test", "FlashRAG")])
def test_what_is_not_there(tmp_path, task, split, words):
    with pytest.raises(DataError, match=words):
        load(task, tmp_path, split)


def test_a_training_row_without_a_tag(tmp_path):
    write_mat(tmp_path, "mat-coding", "train", [{**steps()[0], "solution": "dark"}])
    with pytest.raises(DataError, match="row 1: field 'solution' must hold <problem>"):
        load("mat-coding", tmp_path, "train")


# --- images ---------------------------------------------------------------------------------------


def test_an_image_is_turned_upright_by_its_exif_tag(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6            # "the camera was held turned": 4 x 2 as stored is 2 x 4 upright
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (2, 4)


def test_transparency_becomes_white_whatever_the_name_says(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "png_inside.jpg", format="PNG")
    image = read_image(tmp_path / "png_inside.jpg")
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 128, 255]


def test_an_image_of_another_format_is_refused(tmp_path):
    for form in ("PPM", "EPS"):         # an EPS is a program; Pillow would have it executed
        Image.new("RGB", (2, 2)).save(tmp_path / "page.png", format=form)
        with pytest.raises(DataError, match="page.png: not a readable image"):
            read_image(tmp_path / "page.png")


# The first size is above our limit, the second above Pillow's own.
@pytest.mark.parametrize("size", [(9000, 8000), (14_000, 13_000)])
def test_a_huge_image_is_refused_before_its_pixels_are_read(tmp_path, size):
    Image.new("1", size).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match="huge.png.*pixels"):
        read_image(tmp_path / "huge.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")      # Pillow also warns of some damage
def test_no_damage_to_an_image_ends_in_anything_but_a_data_error(tmp_path):
    rng, path = random.Random(0), tmp_path / "broken.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    refused = 0
    for _ in range(400):
        noise.save(path, format=rng.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 4, 30])):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        path.write_bytes(data[:rng.choice([len(data), len(data) // 2, 3, 0])])
        try:
            assert read_image(path).mode == "RGB"
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
        assert image_defect(path) is None or str(path) in image_defect(path)
    assert refused > 200


def test_a_png_whose_checksums_are_right_but_that_holds_no_pixels(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "empty.png")
    data = (tmp_path / "empty.png").read_bytes()
    (tmp_path / "empty.png").write_bytes(data.replace(b"IDAT", b"xDAT"))
    assert "empty.png: not a readable image" in image_defect(tmp_path / "empty.png")


# --- check: everything that is wrong, at once -----------------------------------------------------


def test_check_counts_and_lists_every_defect(tmp_path):
    rows = [CODING, {**CODING, "answers": ["FOOD\\nHALL"], "split": "simple"},
            {**CODING, "id": 3, "answers": [" "]},
            {**CODING, "id": 4, "processed_image_path": "gone.png"},
            {**CODING, "id": 5, "processed_image_path": "bad.png"},
            {**CODING, "id": 6, "type": ["sepia"], "question": ""}, {"id": 7}]
    write_mat(tmp_path, "mat-coding", "test", rows, images=["a_proc.png"])
    (tmp_path / "MAT-Benchmark/MAT-Coding-image/bad.png").write_bytes(b"no image")
    report, defects = check("mat-coding", tmp_path)
    assert any("MAT-Coding.json: 6 samples (test)" in line for line in report)
    assert "  split: hard 5, simple 1" in report
    assert "  problems: rotation90+dark 5, sepia 1" in report
    assert any("not there (train)" in line for line in report)
    for words in ("row 7: field 'question' is missing", "id 71: occurs 2 times",
                  "id 71: literal \\n in gold", "id 3: empty gold", "gone.png: no such image",
                  "bad.png: not a readable image", "id 6: unknown problem 'sepia'",
                  "id 6: empty question"):
        assert sum(words in line for line in defects) == 1, words
    assert len(defects) == 8


def test_check_finds_damage_inside_a_png_and_names_steps_that_do_not_join(tmp_path):
    write_mat(tmp_path, "mat-coding", "train", steps("a") + steps("b")[:1], images=["a_proc.png"])
    image = tmp_path / "MAT-Training/rft_agent_code_1_2k_images/a_proc.png"
    data = bytearray(image.read_bytes())
    data[-20] ^= 1
    image.write_bytes(data)
    report, defects = check("mat-coding", tmp_path)
    assert any("1 samples joined from 4 steps" in line for line in report)
    unjoined, unreadable = defects
    assert "b (" in unjoined and "a_proc.png: not a readable image" in unreadable


def test_latex_in_a_gold_is_no_line_break():
    # LaTeX's \nu is a Greek letter, \nunits is not
    lines = ["FOOD\\nHALL", "size\\n3", "a\\nbar", "no\\nunits"]
    latex = ["\\neq", "x \\ne y", "\\nu_1", "\\nabla f", "\\not\\in", "\\notin", "\\newline",
             "real\nbreak", "\\rm{n}"]
    assert all(mat.LITERAL_NEWLINE.search(text) for text in lines)
    assert not any(mat.LITERAL_NEWLINE.search(text) for text in latex)


def test_check_of_text_only_files_counts_one_file_once(tmp_path):
    (tmp_path / "dev.jsonl").write_text(json.dumps(QA) + "\n"
                                        + json.dumps({**QA, "golden_answers": [""]}) + "\n")
    report, defects = check("2wiki", tmp_path / "dev.jsonl")
    found = [line for line in report if "samples" in line]
    assert found == [f"{tmp_path / 'dev.jsonl'}: 2 samples (test)"]
    assert len(defects) == 2            # an id twice and an empty gold


@real_files
def test_the_published_sample_has_no_defect():
    report, defects = check("mat-coding", REAL)
    assert defects == [] and "  problems: rotation180 1, dark 1, none 1, crop 1" in report


def test_check_without_any_file_says_where_they_should_be(tmp_path):
    for task in ("mat-coding", "2wiki", "no-task"):
        with pytest.raises(DataError, match="no such file|unknown task"):
            check(task, tmp_path)
