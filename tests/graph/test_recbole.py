"""Knowledge graphs in RecBole's files."""

import pytest

from core.config import UserError
from graph import recbole

KG = ['m1\tactor\tp1', 'p1\tacted_in\tm1', 'm2\tactor\tp1', 'm1\tdirector\tp2', 'm3\tactor\tm1',
      'm2\tgenre\tg', 'm4\tactor\tp2', 'm1\tactor\tp1']
LINK = ['1\tm1', '2\tm3', '3\tm2', '4\tm9']
ITEM = ['1\tHeat\t1995\tDrama War', '2\tHeat\t1996\tWar', '3\tAlien, The\t1979\t', '4\tX\t1\tY',
        '5\tNo entity\t2000\tZ']
ACTS = ('actor', 'movie', 'person')


def write(folder, kg=KG, link=LINK, item=ITEM,
          columns='item_id:token\tmovie_title:token_seq\tyear:token\tclass:token_seq'):
  for ending, header, lines in (('kg', 'head_id:token\trelation_id:token\ttail_id:token', kg),
                                ('link', 'item_id:token\tentity_id:token', link),
                                ('item', columns, item)):
    if lines is not None:
      (folder / f'x.{ending}').write_text(''.join(line + '\n' for line in [header, *lines]))
  return folder / 'x.kg'


def edges(table):
  return {e.name: (e.source, e.target, ' '.join(
      f'{table.names[e.source][s]}>{table.names[e.target][t]}'
      for s, t in zip(e.sources, e.targets))) for e in table.edges}


def test_relations_that_are_named(tmp_path):
  path = write(tmp_path, link=None, item=None)
  table = recbole.read(path, (ACTS, ['director', 'movie', 'maker']), '')
  # p2 is a person and a maker, m1 a movie and (once) a person: two nodes each.
  assert table.names == {'movie': ['m1', 'm2', 'm3', 'm4'], 'person': ['p1', 'm1', 'p2'],
                         'maker': ['p2']}
  assert edges(table) == {'actor': ('movie', 'person', 'm1>p1 m2>p1 m3>m1 m4>p2 m1>p1'),
                          'director': ('movie', 'maker', 'm1>p2')}
  assert not any(table.labels.values())


def test_one_type_in_several_relations_and_at_both_ends(tmp_path):
  table = recbole.read(write(tmp_path, link=None, item=None),
                       [('director', 'thing', 'thing'), ('actor', 'thing', 'person')], '')
  assert table.names == {'thing': ['m1', 'm2', 'p2', 'm3', 'm4'], 'person': ['p1', 'm1', 'p2']}
  assert edges(table)['director'] == ('thing', 'thing', 'm1>p2')


@pytest.mark.parametrize('labels, found', [
    ('class', {0: ['Drama', 'War'], 2: ['War']}), ('', {}),
    ('year', {0: ['1995'], 1: ['1979'], 2: ['1996']}),
    ('movie_title', {0: ['Heat'], 1: ['Alien,', 'The'], 2: ['Heat']})])
def test_titles_and_labels_of_items(tmp_path, labels, found):
  table = recbole.read(write(tmp_path), [ACTS], labels)
  assert table.names['movie'] == ['Heat (m1)', 'Alien, The', 'Heat (m3)', 'm4']
  assert table.names['person'] == ['p1', 'm1', 'p2'] and table.labels == {'movie': found}


def test_items_without_titles_and_several_of_one_entity(tmp_path):
  path = write(tmp_path, link=['1\tm1', '2\tm1', '2\tm2'], item=['1\tA', '2\tB'],
               columns='item_id:token\tclass:token')
  table = recbole.read(path, [ACTS], 'class')
  assert table.names['movie'] == ['m1', 'm2', 'm3', 'm4']
  assert table.labels['movie'] == {0: ['A', 'B'], 1: ['B']}


@pytest.mark.parametrize('relations, words', [
    ([], r'config\.data\.relations for .*x\.kg: names none; there are actor \(5\), acted_in \(1\)'),
    ([ACTS, ('actress', 'a', 'b')], r"has no relation 'actress'; there are actor \(5\), acted_in"),
    ([ACTS, ACTS], r"\('actor', 'movie', 'person'\) is not .* each relation once"),
    ([('actor', 'movie')], r"\('actor', 'movie'\) is not \(relation, head type, tail type\)"),
    (['act'], "'act' is not")])
def test_relations_that_are_wrong(tmp_path, relations, words):
  with pytest.raises(UserError, match=words):
    recbole.read(write(tmp_path), relations, '')


@pytest.mark.parametrize('changes, labels, words', [
    ({}, 'clas', r"labels='clas': .*x\.item has no such column; it has item_id, movie_title, year"),
    (dict(item=None), 'class', r'needs x\.link and x\.item beside'),
    (dict(link=None), 'class', r'needs x\.link and x\.item beside'),
    (dict(link=['1']), '', r'x\.link:2: 1 fields, not 2'),
    (dict(item=['1\tA']), '', r'x\.item:2: 2 fields, not 4'),
    (dict(columns='id:token\tclass:token_seq', item=[]), '', "no column is called 'item_id:tok"),
    (dict(kg=['m1\tactor\tp1', 'm1\tactor']), '', r'x\.kg:3: 2 fields, not 3'),
    (dict(kg=[]), '', r'x\.kg has no triples')])
def test_files_that_are_wrong(tmp_path, changes, labels, words):
  with pytest.raises(UserError, match=words):
    recbole.read(write(tmp_path, **changes), [ACTS], labels)
