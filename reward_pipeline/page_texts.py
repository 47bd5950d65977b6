"""What the page says, in English and in Russian; English sentences are the keys, as in gettext."""

from collections.abc import Callable

Translate = Callable[[str], str]
RUSSIAN = {
    # tabs
    "Score": "Оценка",
    "Arena": "Арена",
    "Mistakes": "Ошибки",
    # score
    "Reward models": "Модели вознаграждения",
    "Directories or hub ids, one a line; several are an ensemble.": (
        "Каталоги или имена на Hugging Face Hub, по одному в строке; несколько — ансамбль."
    ),
    "Prompt": "Запрос",
    "A text; several turns as “User: …”, “Assistant: …”, “User: …” paragraphs, or a message list as JSON.": (
        "Текст; несколько реплик — абзацами «User: …», «Assistant: …», «User: …» или списком сообщений в JSON."
    ),
    "Answers": "Ответы",
    "reward model": "модель вознаграждения",
    "with the form term": "с поправкой на форму",
    "form model, which does not read": "модель формы (смысла не читает)",
    "{} preferred to {} with {} %": "{} предпочтительнее {} с вероятностью {} %",
    "not known: this model was trained without it": "неизвестно: эта модель обучена без неё",
    "What was cut is struck out: the model has not read it.": "Зачёркнутое вырезано: модель этого не читала.",
    "reward": "вознаграждение",
    "spread": "разброс",
    "form": "форма",
    "Answer {} is empty: fill it, or lower the number of answers.": (
        "Ответ {} пуст: заполните его или уменьшите число ответов."
    ),
    "Name a reward model.": "Укажите модель вознаграждения.",
    # arena
    "Your name": "Ваше имя",
    "Prompt (empty: one of the prepared data that you have not voted on)": (
        "Запрос (пусто: из подготовленных данных, по которому вы ещё не голосовали)"
    ),
    "New duel": "Новая дуэль",
    "Asked": "Запрос",
    "Left answer": "Левый ответ",
    "Right answer": "Правый ответ",
    "← Left is better": "← Левый лучше",
    "Right is better →": "Правый лучше →",
    "Tie (T)": "Ничья (T)",
    "Both bad (B)": "Оба плохи (B)",
    "Skip (S)": "Пропустить (S)",
    "Keys: N for a new duel, ← and → for the better one, T, B, S; not while you type.": (
        "Клавиши: N — новая дуэль, ← и → — какой ответ лучше, T, B, S; при вводе текста не действуют."
    ),
    "Who is better?": "Какой ответ лучше?",
    "Answering …": "Модели отвечают …",
    "Enter your name first: votes are counted by voter.": "Сначала введите имя: голоса считаются по участникам.",
    "There is no duel to vote on; begin a new one.": "Голосовать не о чем; начните новую дуэль.",
    "This duel has your vote already; begin a new one.": "В этой дуэли вы уже проголосовали; начните новую.",
    "Saved. Left was {}, right was {}.": "Сохранено. Слева — {}, справа — {}.",
    "Your vote was not saved, and the duel is still there.": "Голос не сохранён, дуэль ещё не закончена.",
    "Result so far": "Результат",
    "Count again and ask the judge": "Пересчитать и спросить судью",
    "model": "модель",
    "against": "против",
    "voter": "участник",
    "all": "все",
    "votes": "голосов",
    "win rate (95 %)": "доля побед (95 %)",
    "won / lost / tie / both bad / skipped": "побед / поражений / ничьих / оба плохи / пропущено",
    "left chosen": "выбран левый",
    "judge agrees": "судья согласен",
    "form model agrees": "модель формы согласна",
    "longer wins": "побеждает более длинный",
    "{} lines of {} hold no vote and are left out.": "Строк без голоса: {} (файл {}); они не учтены.",
    "{} votes in {}.": "Голосов: {} (файл {}).",
    # mistakes
    "Evaluated pairs": "Оценённые пары",
    "A rewards.csv of train_reward_model.py or evaluate_reward_model.py.": (
        "Файл rewards.csv от train_reward_model.py или evaluate_reward_model.py."
    ),
    "Category": "Категория",
    "Form model": "Модель формы",
    "agrees with people": "согласна с людьми",
    "is wrong as well": "тоже ошибается",
    "can not tell": "не может решить",
    "Least characters": "Не меньше знаков",
    "Most characters": "Не больше знаков",
    "of the longer answer": "в более длинном ответе",
    "of the longer answer; 0 is no bound": "в более длинном ответе; 0 — без предела",
    "Show": "Показать",
    "{} of {} pairs are wrong and pass the filters; the worst {} are shown. Click a row to read it.": (
        "Ошибочных пар, прошедших фильтры: {} из {}; показаны худшие {}. Нажмите на строку, чтобы прочесть."
    ),
    "margin": "разница вознаграждений",
    "category": "категория",
    "pair": "пара",
    "prompt": "запрос",
    "Preferred by people": "Предпочли люди",
    "Preferred by the model": "Предпочла модель",
    # errors
    "the prompt is empty": "запрос пуст",
    "there is no prepared prompt; type one": "подготовленных запросов нет; введите свой",
    "an answer is empty, so there is nothing to vote on; ask again": (
        "один из ответов пуст, голосовать не о чем; повторите"
    ),
    "both answers are the same, so there is nothing to vote on; ask again": (
        "оба ответа одинаковы, голосовать не о чем; повторите"
    ),
}


def translator(accept_language: str | None) -> Translate:
    """What says a text in the language that a browser asks for first, as its `Accept-Language` has it."""
    russian = (accept_language or "").lstrip().lower().startswith("ru")
    return lambda text: RUSSIAN.get(text, text) if russian else text
