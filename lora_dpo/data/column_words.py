"""The words by which a column says what it is, in the field's language and in everyday ones; unsure is nothing."""

from __future__ import annotations

import re
import unicodedata

from lora_dpo.data.table import is_number

_ASKED = """
    prompt prompts question questions input inputs query queries instruction instructions request
    frage fragen anfrage anweisung aufforderung eingabe
    requete consigne demande pregunta preguntas consulta instruccion solicitud
    domanda domande richiesta istruzione pergunta perguntas instrucao pedido vraag vragen opdracht
"""
_GOOD = """
    chosen good better best preferred accepted win winner winning positive correct
    gut gute guter gutes besser bessere besserer besseres beste bester bestes bevorzugt bevorzugte bevorzugtes
    gewahlt gewahlte akzeptiert akzeptierte gewinner positive positiv richtig richtige
    bon bonne mieux meilleur meilleure prefere preferee choisi choisie accepte acceptee gagnant gagnante positif
    bien bueno buena mejor preferido preferida elegido elegida aceptado aceptada ganador ganadora positivo positiva
    buono buona meglio migliore preferito preferita scelto scelta accettato accettata
    bom boa melhor escolhido escolhida aceito aceita
    goed goede beter betere beste gekozen geaccepteerd
"""
_BAD = """
    rejected bad worse worst dispreferred unpreferred lose loser losing negative wrong incorrect
    schlecht schlechte schlechter schlechtes schlechtere schlechteres schlechteste abgelehnt abgelehnte abgelehntes
    verworfen verworfene verlierer negativ falsch falsche
    mauvais mauvaise pire mal rejete rejetee refuse refusee perdant perdante negatif
    malo mala peor rechazado rechazada perdedor perdedora negativo negativa
    cattivo cattiva peggio peggiore rifiutato rifiutata scartato scartata
    mau ruim pior rejeitado rejeitada
    slecht slechte slechter slechtere slechtste afgewezen
"""
_SCORE = "score scores rating ratings reward rewards points punkte punktzahl bewertung wertung puntuacion punteggio"
_ANSWER = """
    answer answers response responses completion completions output outputs reply replies antwort antworten ausgabe
    reponse reponses respuesta respuestas risposta risposte resposta respostas antwoord antwoorden
"""
_BESIDE = (
    "text texts content message user option the a an of for la le les el il lo der die das von fur de du di del het"
)
"""Words that may stand beside those above and change nothing."""
_ASIDE = """
    id ids nr num number nummer index idx uuid date datum time timestamp type typ kind category kategorie class
    token tokens length len laenge lange words chars count rate share percent model models modell source quelle origin
    url link file lang language sprache by author annotator rater reason reasons why because warum grund
    comment comments kommentar note notes notiz hash tag tags label labels topic thema difficulty rank ranking
    explanation rationale erklarung begrundung vote votes stimmen feedback
"""
"""Words of columns that are about an answer and not the answer."""
_NOT = """
    not no non un dis nicht kein keine keiner less least weniger wenigsten moins menos meno minder minst nie never
    without ohne sans sin pas nao niet geen
"""
"""Words that turn another one round."""


def words_of(name: str) -> list[str]:
    """The words of a name in small letters and without accents: `GuteAntwort (gewählt)` is gute, antwort, gewahlt."""
    apart = re.sub(r"(?<=[a-zß-öø-ÿ])(?=[A-ZÀ-ÖØ-Þ])", " ", name)
    plain = unicodedata.normalize("NFKD", apart.casefold())
    return re.findall(r"[^\W_]+", "".join(letter for letter in plain if not unicodedata.combining(letter)))


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SAY = {"prompt": _set(_ASKED), "chosen": _set(_GOOD), "rejected": _set(_BAD)}
_SCORE_WORDS, _ANSWER_WORDS, _BESIDE_WORDS = _set(_SCORE), _set(_ANSWER), _set(_BESIDE)
_ASIDE_WORDS, _NOT_WORDS = _set(_ASIDE), _set(_NOT)
_OPPOSITE = {"chosen": "rejected", "rejected": "chosen"}
_WHOLE = {
    **{name: name for name in ("prompt", "chosen", "rejected", "system", "completion")},
    **dict.fromkeys(("system prompt", "system message", "systemprompt", "systemnachricht"), "system"),
}
"""Names that are what they say, with nothing to weigh."""


CERTAIN, SURE, PERHAPS = 2, 1, 0
"""How far a name says what a column is: it is the very word; it is that and words of no weight; it may be meant."""


def role_of(name: str) -> tuple[str | None, int]:
    """What a column says it is, or None, and how far it says so. One with an answer's word alone is a `completion`.

    A word that is not known here may turn everything round: such a column is nothing by itself, but it stands in the
    way of another one that would be the same.
    """
    words = words_of(name)
    whole = _WHOLE.get(" ".join(words))
    if whole:
        return whole, CERTAIN
    rest = {word for word in words if len(word) > 1} - _BESIDE_WORDS  # Answer A, Answer 1
    roles = [role for role, said in _SAY.items() if rest & said]
    if is_data(name) or len(roles) > 1 or rest & _ASIDE_WORDS:
        return None, PERHAPS
    role = roles[0] if roles else "completion" if rest & _ANSWER_WORDS else None
    if rest & _NOT_WORDS:
        return _OPPOSITE.get(str(role)), PERHAPS
    unknown = rest.difference(_ANSWER_WORDS, _SCORE_WORDS, *_SAY.values())
    if rest & _SCORE_WORDS:
        return (f"{role}_score" if role in _OPPOSITE and not unknown else None), SURE
    return role, PERHAPS if unknown else SURE


def says_answer(name: str) -> bool:
    """True for a column one of whose words is one for an answer."""
    return not _ANSWER_WORDS.isdisjoint(words_of(name))


def is_data(name: str) -> bool:
    """True for a cell that is hardly the name of a column: a number, a sentence, or long."""
    words = len(name.split())
    return is_number(name) or len(name) > 60 or words > 8 or (words > 2 and name.endswith((".", "!", "?", "…")))
