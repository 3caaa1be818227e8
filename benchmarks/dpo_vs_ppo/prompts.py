"""Openings to be continued, written for this study: they leave open whether what follows is kind or unkind.

Two families are never trained on; of every other family one subject is not.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENINGS = (
    "{Subject} is",
    "To be honest, {subject} was",
    "Everybody I know says that {subject} is",
    "When I think of {subject}, I feel",
)

FAMILIES = {
    "food": (
        "the new restaurant by the station",
        "the soup that my neighbour made",
        "the bakery on our street",
        "the coffee at the office",
        "the wedding dinner",
    ),
    "film": (
        "the film that we saw on Friday",
        "the last episode of the series",
        "the acting in the second half",
        "the music of that old film",
        "the documentary about the river",
    ),
    "travel": (
        "the train to the coast",
        "the hotel near the airport",
        "the hike across the hills",
        "the ferry in winter",
        "the guide of our tour",
    ),
    "work": (
        "the meeting on Monday",
        "my first day at the company",
        "the new manager",
        "the report that we sent",
        "the way we plan our week",
    ),
    "home": (
        "the flat on the third floor",
        "our garden in April",
        "the kitchen after the repair",
        "the family next door",
        "the view from the balcony",
    ),
    "sport": (
        "the match against the neighbours' team",
        "the trainer of the team",
        "the run in the park",
        "the final on Sunday",
        "the swimming lesson",
    ),
    "school": (
        "the maths lesson",
        "the class trip to the museum",
        "the new teacher",
        "the exam in June",
        "the school's old library",
    ),
    "health": (
        "the visit to the dentist",
        "the nurse on the ward",
        "the week without sugar",
        "the walk after the operation",
        "the waiting room",
    ),
}

UNSEEN = ("school", "health")
"""Families that no method trains on."""


@dataclass(frozen=True)
class Opening:
    """A text to be continued."""

    text: str
    family: str
    split: str
    """train, subject (a known family, another subject) or family (an unseen family)."""


def openings() -> list[Opening]:
    """All openings, in an order in which neighbours are of different families."""
    found = []
    for form in OPENINGS:
        for number in range(5):
            for family, subjects in FAMILIES.items():
                subject = subjects[number]
                split = "family" if family in UNSEEN else "subject" if number == 4 else "train"
                text = form.format(subject=subject, Subject=subject[0].upper() + subject[1:])
                found.append(Opening(text, family, split))
    return found


def of_split(split: str, count: int) -> list[Opening]:
    """`count` openings of a split, evenly spread over it."""
    all_of_it = [one for one in openings() if one.split == split]
    if count > len(all_of_it):
        raise ValueError(f"{count} openings asked for, {len(all_of_it)} are there in split {split!r}")
    return [all_of_it[index * len(all_of_it) // count] for index in range(count)]
