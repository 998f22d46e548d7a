"""The positive class: never one that is called healthy, asked for where unclear."""

import pytest

from cxai_jax.data.positive import is_negative, positive_class


@pytest.mark.parametrize(
    "names,positive",
    [
        (["Abnormal", "Normal"], 0),
        (["Cancer", "Healthy"], 0),
        (["Effusion", "No_findings"], 0),
        (["Effusion", "NoFinding"], 0),
        (["Effusion", "no finding"], 0),
        (["TB", "controls"], 0),
        (["CT_COVID", "CT_NonCOVID"], 0),
        (["NON-COVID", "covid19"], 1),
        (["covid-negative", "covid-positive"], 1),
        (["COVID", "Normal", "Pneumonia"], 0),
        (["nonpositive", "positive", "z"], 1),
        (["Nodule", "Normal"], 0),
    ],
)
def test_the_only_class_of_a_disease_is_positive(names, positive):
    assert positive_class(names) == positive
    assert positive_class(names, names[1 - positive].upper()) == 1 - positive


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b", "c"],
        ["bacterial", "viral"],
        ["Normal", "Healthy"],
        ["COVID-19", "COVID-20"],
        ["Normal", "Pneumonia", "Tuberculosis"],
    ],
)
def test_what_is_not_clear_is_asked_for(names):
    with pytest.raises(ValueError, match=f"{names[0]}, .*with --positive=CLASS"):
        positive_class(names)
    assert positive_class(names, names[-1]) == len(names) - 1


def test_a_class_that_does_not_exist():
    with pytest.raises(ValueError, match="--positive=c is none of the classes a, b"):
        positive_class(["a", "b"], "c")
    with pytest.raises(ValueError, match="--positive=A is none of the classes a, a"):
        positive_class(["a", "a"], "A")


@pytest.mark.parametrize("name", ["abnormal", "Nodule", "disease"])
def test_names_that_only_begin_alike_are_diseases(name):
    assert not is_negative(name)
