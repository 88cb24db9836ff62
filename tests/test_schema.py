"""Label configs as people write them, and as nobody should: what parse makes of each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptllm_core.errors import SchemaError
from kptllm_core.keypoints import KeypointSchema
from label_config.schema import KeypointControl, parse
from label_config.writer import config_of

IMAGE = '<Image name="image" value="$image"/>'
LABELS = '<Label value="nose"/><Label value="left_eye"/><Label value="right_eye"/>'


def control(labels: str = LABELS, attributes: str = "", others: str = "") -> KeypointControl:
    (found,) = parse(
        f'<View>{IMAGE}{others}<KeyPointLabels name="kp" toName="image" {attributes}>{labels}</KeyPointLabels></View>'
    ).controls
    return found


def test_the_plain_config() -> None:
    kp = control()
    assert (kp.from_name, kp.to_name, kp.image_key) == ("kp", "image", "image")
    assert kp.schema == KeypointSchema(("nose", "left_eye", "right_eye"), symmetric=((1, 2),))
    assert kp.labels == kp.shown == kp.schema.names
    assert kp.box is None and kp.occluded is None and kp.missing == "unlabelled"
    assert not kp.find_objects and kp.add_bboxes
    assert (kp.score_threshold, kp.point_threshold, kp.point_size) == (0.0, 0.0, None)


def test_nested_views_and_foreign_tags() -> None:
    config = parse("""<View><Style>.x { color: red }</Style><Header value="$title"/>
      <View style="display:flex"><View><Collapse><Panel value="more"><KeyPointLabels name="kp" toName="img">
        <View><Header value="face"/><Label value="nose"/></View><!-- a comment --><View><Label value="chin"/></View>
      </KeyPointLabels></Panel></Collapse></View>
      <View><Image name="img" value="$url"/><BrushLabels name="b" toName="img"><Label value="hair"/></BrushLabels></View></View>
      <Choices name="quality" toName="img"><Choice value="good"/></Choices><Text name="t" value="$text"/>
      <Rating name="r" toName="t"/><Custom unknown="1"/></View>""")
    (kp,) = config.controls
    assert kp.schema.names == ("nose", "chin") and kp.image_key == "url" and kp.occluded is None and config.notes == ()


def test_tags_in_any_case_and_names_in_any_script() -> None:
    (kp,) = parse("""<view><image name="bild" value="$bild"/><keypointlabels name="點" toName="bild">
      <label value="左眼"/><label value="نقطة"/><label value="Nasenspitze – ‘x’ &amp; &lt;y&gt;"/></keypointlabels></view>""").controls
    assert kp.schema.names == ("左眼", "نقطة", "Nasenspitze – ‘x’ & <y>") and kp.from_name == "點"


def test_aliases_travel_on_the_wire_and_values_are_what_people_and_model_read() -> None:
    kp = control('<Label value="left eye" alias="LE"/><Label value="right eye" alias="RE"/><Label alias="N"/>')
    assert kp.schema.names == ("left eye", "right eye", "N") and kp.labels == ("LE", "RE", "N")
    assert kp.label_of("left eye") == "LE"
    assert kp.name_of("LE") == kp.name_of("left eye") == "left eye"
    assert kp.name_of("le") is None and kp.name_of(None) is None and kp.name_of(["LE"]) is None
    assert kp.schema.symmetric == ((0, 1),)


def test_an_alias_that_is_anothers_value_means_the_alias() -> None:
    kp = control('<Label value="a" alias="b"/><Label value="b" alias="a"/>')
    assert kp.name_of("b") == "a" and kp.name_of("a") == "b"


def test_model_index_orders_and_the_rest_follows() -> None:
    kp = control(
        '<Label value="c"/><Label value="b" model_index="7"/><Label value="a" model_index="0"/><Label value="d"/>'
    )
    assert kp.schema.names == ("a", "b", "c", "d")


def test_predicted_values_shared_are_the_kind_of_object() -> None:
    labels = '<Label value="nose" predicted_values="person" model_index="0"/><Label value="hip" predicted_values="person" model_index="1"/>'
    assert control(labels).schema == KeypointSchema(("nose", "hip"), "person")
    one = '<Label value="nose" predicted_values="person" model_index="0"/>'
    assert control(one).schema == KeypointSchema(("nose",), "person")


def test_predicted_values_that_differ_are_what_the_model_calls_the_points() -> None:
    kp = control(
        '<Label value="左眼" predicted_values="left_eye,eye"/><Label value="右眼" predicted_values="right_eye"/><Label value="chin"/>'
    )
    assert kp.schema.names == ("left_eye", "right_eye", "chin") and kp.schema.symmetric == ((0, 1),)
    assert kp.labels == ("左眼", "右眼", "chin") and kp.name_of("左眼") == "left_eye"


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("nose-left_eye", ((0, 1),)),
        (" nose - left_eye , left_eye-right_eye,", ((0, 1), (1, 2))),
        ("nose-left_eye;left_eye-right_eye;nose-left_eye", ((0, 1), (1, 2))),
        ('[["nose","right_eye"]]', ((0, 2),)),
        ("", ()),
    ],
)
def test_skeleton(text: str, pairs: tuple[tuple[int, int], ...]) -> None:
    assert control(attributes=f"model_skeleton='{text}'").schema.skeleton == pairs


def test_skeleton_of_labels_that_hold_the_separators() -> None:
    labels = '<Label value="C-7"/><Label value="T-1"/><Label value="a,b"/><Label value="x;y-z"/>'
    assert control(labels, 'model_skeleton="C-7-T-1"').schema.skeleton == ((0, 1),)
    assert control(labels, 'model_skeleton="T-1-a,b;C-7-T-1"').schema.skeleton == ((1, 2), (0, 1))
    assert control(labels, """model_skeleton='[["x;y-z","a,b"]]'""").schema.skeleton == ((3, 2),)


def test_skeleton_takes_aliases_values_and_the_models_words() -> None:
    labels = '<Label value="Nase" alias="N" predicted_values="nose"/><Label value="Kinn" predicted_values="chin"/>'
    for text in ("N-Kinn", "Nase-chin", "nose-Kinn"):
        assert control(labels, f'model_skeleton="{text}"').schema.skeleton == ((0, 1),)


def test_symmetric_pairs_said_or_read_from_the_names() -> None:
    assert control().schema.symmetric == ((1, 2),)
    assert control(attributes='model_symmetric=""').schema.symmetric == ()
    assert control(attributes='model_symmetric="nose-right_eye"').schema.symmetric == ((0, 2),)
    assert (
        control('<Label value="oeil gauche"/><Label value="oeil droite"/><Label value="oeil droit"/>').schema.symmetric
        == ()
    )


def test_thresholds_and_flags() -> None:
    kp = control(
        attributes='model_score_threshold="0.25" model_point_threshold=".5" model_point_size="4" model_add_bboxes="false" '
        'model_missing="absent" model_find_objects="yes" model_category="cat"'
    )
    assert (kp.score_threshold, kp.point_threshold, kp.point_size, kp.add_bboxes) == (0.25, 0.5, 4.0, False)
    assert (kp.missing, kp.find_objects, kp.schema.category) == ("absent", True, "cat")


def test_box_controls() -> None:
    def rectangles(name: str, label: str = "mouse") -> str:
        return f'<RectangleLabels name="{name}" toName="image"><Label value="{label}" alias="{label[0]}"/></RectangleLabels>'

    kp = control(others=rectangles("anything"))
    assert kp.box is not None and (kp.box.from_name, kp.box.labels, kp.box.type) == (
        "anything",
        ("m",),
        "rectanglelabels",
    )
    assert kp.schema.category == "m" and kp.find_objects
    both = control(others=rectangles("other") + rectangles("kp_bbox", "rat"))
    assert both.box is not None and both.box.from_name == "kp_bbox"
    plain = control(others='<Rectangle name="r" toName="image" smart="true"/>')
    assert plain.box is not None and (plain.box.type, plain.box.labels) == ("rectangle", ())
    assert (
        control(others='<RectangleLabels name="kp_bbox" toName="second"><Label value="x"/></RectangleLabels>').box
        is None
    )
    assert not control(attributes='model_find_objects="false"', others=rectangles("b")).find_objects
    with pytest.raises(SchemaError, match=r'Name the one that holds the points .* "kp_bbox"'):
        control(others=rectangles("one") + rectangles("two"))


def test_several_controls_with_their_own_and_with_shared_boxes() -> None:
    def points(name: str, attributes: str = "") -> str:
        return (
            f'<KeyPointLabels name="{name}" toName="image" {attributes}><Label value="{name}_nose"/></KeyPointLabels>'
        )

    shared = '<RectangleLabels name="box" toName="image"><Label value="Cat"/><Label value="Dog"/></RectangleLabels>'
    config = parse(f'<View>{IMAGE}{points("cat")}{points("d", """model_category="dog" """)}{shared}</View>')
    assert [c.box.labels for c in config.controls if c.box] == [("Cat",), ("Dog",)]
    own = '<RectangleLabels name="cat_bbox" toName="image"><Label value="Cat"/></RectangleLabels>'
    config = parse(f"<View>{IMAGE}{points('cat')}{points('dog')}{own}</View>")
    assert [c.box is not None for c in config.controls] == [True, False]
    assert config.control("dog") is config.controls[1] and config.control("dog", "other") is None


def test_one_control_on_several_images() -> None:
    config = parse("""<View><Image name="a" value="$front"/><Image name="b" value="$side"/>
      <KeyPointLabels name="kp" toName="a,b"><Label value="nose"/></KeyPointLabels></View>""")
    assert [(c.to_name, c.image_key) for c in config.controls] == [("a", "front"), ("b", "side")]
    found = config.control("kp", "b")
    assert found is not None and found.image_key == "side"


def test_what_is_left_aside_is_noted() -> None:
    config = parse(f"""<View>{IMAGE}<Image name="pages" valueList="$pages"/><Video name="v" value="$v"/>
      <KeyPointLabels name="kp" toName="image">{LABELS}</KeyPointLabels>
      <KeyPointLabels name="on_video" toName="v">{LABELS}</KeyPointLabels>
      <KeyPointLabels name="on_pages" toName="pages">{LABELS}</KeyPointLabels></View>""")
    assert len(config.controls) == 1
    assert "on_video" in config.notes[0] and "pages" in config.notes[1] and "$image" in config.notes[1]


@pytest.mark.parametrize(
    ("choices", "found"),
    [
        ('<Choices name="v" toName="image" perRegion="true"><Choice value="occluded"/></Choices>', ("v", "occluded")),
        (
            '<Choices name="v" toName="image" perRegion="true"><Choice value="ok"/><Choice value="Hidden"/></Choices>',
            ("v", "Hidden"),
        ),
        (
            '<Choices name="v" toName="image" perRegion="true"><Choice value="occluded" alias="1"/></Choices>',
            ("v", "1"),
        ),
        ('<Choices name="v" toName="image"><Choice value="occluded"/></Choices>', (None, "")),
        ('<Choices name="v" toName="image" perRegion="true"><Choice value="blurred"/></Choices>', (None, "")),
        (
            '<Choices name="v" toName="image" perRegion="true" whenTagName="other"><Choice value="occluded"/></Choices>',
            (None, ""),
        ),
        (
            '<Choices name="v" toName="image" perRegion="true" whenTagName="kp"><Choice value="occluded"/></Choices>',
            ("v", "occluded"),
        ),
    ],
)
def test_the_choice_that_marks_hidden_points(choices: str, found: tuple[str | None, str]) -> None:
    kp = control(others=choices)
    assert (kp.occluded, kp.occluded_choice) == found


def test_the_image_in_a_tasks_data() -> None:
    def of(value: str, data: dict[str, object]) -> str | None:
        image = f'<Image name="i" value="{value}"/>'
        (kp,) = parse(f'<View>{image}<KeyPointLabels name="k" toName="i">{LABELS}</KeyPointLabels></View>').controls
        return kp.image_of(data)

    assert of("$image", {"image": "/data/upload/1.png", "other": 1}) == "/data/upload/1.png"
    assert of("$a.b", {"a": {"b": "x"}}) == of("$a.b", {"a.b": "x"}) == of("$a[1].b", {"a": [0, {"b": "x"}]}) == "x"
    assert of("$image", {"$undefined$": "/x.png"}) == "/x.png"  # files imported before the project had a config
    for bad in ({}, {"image": None}, {"image": ""}, {"image": 3}, {"image": ["x"]}):
        assert of("$image", bad) is None
    assert of("$a[1].b", {"a": [0]}) is None
    assert of("$a[²]", {"a": ["x"]}) is None


BAD = {
    "empty": ("", "empty"),
    "no text": (None, "empty"),
    "no XML": ("points: nose, eye", "no valid XML"),
    "not closed": ("<View>", "no valid XML"),
    "doctype": ('<!DOCTYPE x [<!ENTITY a "b">]><View/>', "DOCTYPE"),
    "external entity": ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><View/>', "DOCTYPE"),
    "undeclared entity": ("<View>&lol;</View>", "no valid XML"),
    "deep": ("<View>" * 100_000, "deeper than"),
    "long": ("<View>" + " " * 1_000_001, "at most"),
    "lone surrogate": ('<View a="\ud800"/>', "no valid XML"),
    "no keypoints": (f'<View>{IMAGE}<Choices name="c" toName="image"><Choice value="a"/></Choices></View>', "among Choices.*<KeyPointLabels name"),
    "KeyPoint": (f'<View>{IMAGE}<KeyPoint name="k" toName="image"/></View>', "use <KeyPointLabels>"),
    "no image": (f'<View><KeyPointLabels name="k" toName="image">{LABELS}</KeyPointLabels></View>', "no <Image>; images here: none"),
    "on text": (f'<View><Text name="t" value="$t"/><KeyPointLabels name="k" toName="t">{LABELS}</KeyPointLabels></View>', "no <Image>"),
    "no toName": (f'<View>{IMAGE}<KeyPointLabels name="k">{LABELS}</KeyPointLabels></View>', "needs a name and a toName"),
    "name twice": (f'<View>{IMAGE}{f"""<KeyPointLabels name="k" toName="image">{LABELS}</KeyPointLabels>""" * 2}</View>', "Two KeyPointLabels"),
    "fixed image": (f'<View><Image name="i" value="http://x/a.png"/><KeyPointLabels name="k" toName="i">{LABELS}</KeyPointLabels></View>', "one "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_configs_that_cannot_be_used(name: str) -> None:
    config, said = BAD[name]
    with pytest.raises(SchemaError, match=f"(?s){said}"):
        parse(config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "attributes", "said"),
    [
        ("", "", "no labels.*<Label value="),
        ('<Label value=" "/>', "", "no labels"),
        ("", 'value="$labels"', "from each task"),
        ('<Label value="a"/><Label value="a"/>', "", "'a' on several labels.*kp_bbox"),
        ('<Label value="a" alias="x"/><Label value="b" alias="x"/>', "", "alias 'x' on several"),
        ('<Label value="nose"/><Label value="Nase" predicted_values="nose"/>', "", "predicted_values 'nose'"),
        ('<Label value="a" model_index="1"/><Label value="b" model_index="1"/>', "", 'model_index="1" on two'),
        ('<Label value="a" model_index="first"/>', "", "whole number"),
        ('<Label value="a" model_index="-1"/>', "", "whole number"),
        (LABELS, 'model_skeleton="nose-mouth"', "'nose-mouth'.*Known: nose, left_eye.*nose-left_eye"),
        (LABELS, 'model_skeleton="nose"', "'nose'"),
        (LABELS, 'model_skeleton="nose-nose"', "with itself"),
        (LABELS, "model_skeleton='[1,2]'", "no JSON list"),
        (LABELS, """model_skeleton='[["nose","chin"]]'""", "'chin'"),
        ('<Label value="a"/><Label value="b-c"/><Label value="a-b"/><Label value="c"/>', 'model_skeleton="a-b-c"', "2 ways.*JSON"),
        (LABELS, 'model_symmetric="nose-left_eye,nose-right_eye"', "in two pairs"),
        (LABELS, 'model_missing="maybe"', "absent.*unlabelled"),
        (LABELS, 'model_point_threshold="30"', "from 0 to 1"),
        (LABELS, 'model_point_threshold="nan"', "from 0 to 1"),
        (LABELS, 'model_point_size="0"', "above 0"),
        (LABELS, 'model_add_bboxes="perhaps"', '"true" or "false"'),
        ("".join(f'<Label value="p{i}"/>' for i in range(300)), "", "at most 256"),
    ],
)  # fmt: skip
def test_controls_that_cannot_be_used(labels: str, attributes: str, said: str) -> None:
    with pytest.raises(SchemaError, match=f"(?s){said}"):
        control(labels, attributes)


def test_the_hash_is_of_the_meaning() -> None:
    def of(labels: str = LABELS, attributes: str = "", others: str = "") -> str:
        return parse(
            f'<View>{others}{IMAGE}<KeyPointLabels name="kp" toName="image" {attributes}>{labels}</KeyPointLabels></View>'
        ).hash

    same = of()
    assert len(same) == 64 and same == of(
        LABELS.replace("/>", ' background="red" hotkey="q"/>'), 'strokeWidth="9"', '<Header value="x"/>'
    )
    assert same == of(attributes='model_point_threshold="0.4" smart="true"')
    changed = [of(LABELS.replace("nose", "nase")), of('<Label value="x"/>' + LABELS), of(attributes='model_missing="absent"'),
               of(attributes='model_symmetric=""'), of(attributes='model_skeleton="nose-left_eye"'),
               of(LABELS.replace('value="left_eye"', 'value="left_eye" model_index="0"')),
               of(others='<Rectangle name="r" toName="image"/>')]  # fmt: skip
    assert len({same, *changed}) == 1 + len(changed)


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="￾￿"), min_size=1, max_size=12
).filter(str.strip)


@st.composite
def schemas(draw: st.DrawFn) -> KeypointSchema:
    found = tuple(draw(st.lists(names, min_size=1, max_size=8, unique=True)))
    pair = st.permutations(range(len(found))).map(lambda p: (p[0], p[1]))
    skeleton = draw(st.lists(pair, max_size=6, unique=True)) if len(found) > 1 else []
    order = draw(st.permutations(range(len(found))))
    symmetric = tuple(zip(order[0::2], order[1::2], strict=False))[: draw(st.integers(0, 4))]
    return KeypointSchema(found, draw(names.map(str.strip)), tuple(skeleton), symmetric)


@given(schemas(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_schema_written_as_a_config_reads_back(schema: KeypointSchema, box: bool) -> None:
    (kp,) = parse(config_of(schema, box)).controls
    assert kp.schema.to_json() | {"symmetric": None} == schema.to_json() | {"symmetric": None}
    assert {frozenset(p) for p in kp.schema.symmetric} == {frozenset(p) for p in schema.symmetric}
    assert (kp.box is not None) == box and kp.occluded == "visibility"


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    for config in (
        text,
        f'<View>{IMAGE}<KeyPointLabels name="k" toName="image"><Label value="{text}"/></KeyPointLabels></View>',
    ):
        try:
            parse(config)
        except SchemaError as error:
            assert error.message
