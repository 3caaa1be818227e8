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
_ANSWER = "answer response completion output reply antwort ausgabe reponse respuesta risposta resposta antwoord"
_ASIDE = """
    id ids nr no num number nummer index idx uuid date datum time timestamp type typ kind category kategorie class
    token tokens length len laenge lange words chars count rate share percent model models modell source quelle origin
    url link file lang language sprache by author user annotator rater reason reasons why because warum grund
    comment comments kommentar note notes notiz hash tag tags label labels topic thema difficulty rank ranking
    explanation rationale erklarung begrundung vote votes stimmen
"""
"""Words of columns that are about an answer and not the answer."""
_NOT = """
    not no non un dis nicht kein keine keiner less least weniger wenigsten moins menos meno minder minst nie never
    without ohne sans sin pas nao niet geen
"""
"""Words that turn another one round: a column with one is read for nothing."""


def words_of(name: str) -> list[str]:
    """The words of a name in small letters and without accents: `GuteAntwort (gewählt)` is gute, antwort, gewahlt."""
    apart = re.sub(r"(?<=[a-zß-öø-ÿ])(?=[A-ZÀ-ÖØ-Þ])", " ", name)
    plain = unicodedata.normalize("NFKD", apart.casefold())
    return re.findall(r"[^\W_]+", "".join(letter for letter in plain if not unicodedata.combining(letter)))


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SAY = {"prompt": _set(_ASKED), "chosen": _set(_GOOD), "rejected": _set(_BAD)}
_SCORE_WORDS, _ANSWER_WORDS, _OTHERS = _set(_SCORE), _set(_ANSWER), _set(_ASIDE) | _set(_NOT)
_WHOLE = {
    **{name: name for name in ("prompt", "chosen", "rejected", "system", "completion")},
    **dict.fromkeys(("system prompt", "system message", "systemprompt", "systemnachricht"), "system"),
}
"""Names that are what they say, with nothing to weigh."""


def role_of(name: str) -> tuple[str | None, bool]:
    """What a column says it is, or None, and whether that is the very name of it."""
    words = words_of(name)
    whole = _WHOLE.get(" ".join(words))
    if whole:
        return whole, True
    found = set(words)
    roles = [role for role, said in _SAY.items() if found & said]
    if is_data(name) or found & _OTHERS or len(roles) > 1:
        return None, False
    role = roles[0] if roles else None
    if found & _SCORE_WORDS:
        return (f"{role}_score" if role in ("chosen", "rejected") else None), False
    if role is None and found & _ANSWER_WORDS:
        return "completion", False
    return role, False


def is_data(name: str) -> bool:
    """True for a cell that is hardly the name of a column: a number, a sentence, or long."""
    words = len(name.split())
    return is_number(name) or len(name) > 60 or words > 8 or (words > 2 and name.endswith((".", "!", "?", "…")))
