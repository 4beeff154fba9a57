"""Feedback: what people, rules, models and judges say of answers.

records, items   the files                    expand                        records to preference data
label            `fettle label`               screening, agreement          labelers
rewards          numbers for answers          bradley_terry, elo, win_rate  models
"""
